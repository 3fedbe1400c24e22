"""The logarithmic grid against a table worked by hand, and its gradients against the rule of LSQ."""

from __future__ import annotations

import math

import pytest
import torch

from tfmq.numerics.logarithmic import log2_codes, log2_fake_quantize

# Value, its code and what it becomes, for a largest value of 0.8 and 3 bits: 0.8, 0.4, 0.2, 0.1, 0.05, 0.025, 0.0125
# and 0.00625. A value between two of them goes to the nearer power of two: 0.57 / 0.8 = 0.7125 is above
# 2^-0.5 = 0.7071 and so takes code 0, and 0.56 / 0.8 = 0.7 is below.
TABLE = [
    (0.8, 0, 0.8),
    (0.57, 0, 0.8),
    (0.56, 1, 0.4),
    (0.4, 1, 0.4),
    (0.29, 1, 0.4),
    (0.28, 2, 0.2),
    (0.1, 3, 0.1),
    (0.011, 6, 0.0125),
    (0.00625, 7, 0.00625),
    (0.0001, 7, 0.00625),
    (0.0, 7, 0.00625),
    (1.6, 0, 0.8),  # beyond the largest
]


def test_codes_and_values_are_those_of_the_table():
    x, codes, values = (torch.tensor(column) for column in zip(*TABLE, strict=True))
    scale = torch.tensor([0.8])
    assert log2_codes(x, scale, 3).tolist() == codes.tolist()
    torch.testing.assert_close(log2_fake_quantize(x, scale, 3), values.float())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_relative_error_is_at_most_that_of_half_a_code(bits):
    x = torch.logspace(0, -(2**bits) + 1, 1000, base=2, dtype=torch.float64)
    x = x[x > 2.0**-100]
    found = log2_fake_quantize(x, torch.ones(1, dtype=torch.float64), bits)
    assert (found / x).log2().abs().max() <= 0.5 + 1e-9
    assert len(found.unique()) <= 2**bits


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_is_quantised_in_float32_and_comes_out_in_its_own(kind):
    x = torch.rand(50, generator=torch.Generator().manual_seed(0)).to(kind)
    found = log2_fake_quantize(x, torch.ones(1), 4)
    assert found.dtype == kind
    torch.testing.assert_close(found.float(), log2_fake_quantize(x.float(), torch.ones(1), 4), rtol=1e-2, atol=0)


def test_nan_passes_for_the_caller_to_see():
    assert torch.isnan(log2_fake_quantize(torch.tensor([math.nan]), torch.ones(1), 4)).all()


def test_gradients_are_those_of_a_rounding_passed_straight_through():
    """d x_hat / d x = 1 inside; d x_hat / d s = x_hat / s - x / s inside, and x_hat / s where the last code clips."""
    x = torch.tensor([0.8, 0.57, 0.3, 0.001], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([0.8], dtype=torch.float64, requires_grad=True)
    found = log2_fake_quantize(x, scale, 3)
    with torch.no_grad():
        torch.testing.assert_close(found, log2_fake_quantize(x, scale, 3))
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    (found * weights).sum().backward()
    assert x.grad.tolist() == [1, 2, 3, 0]
    inside = [1 - 1.0, 2 * (1 - 0.57 / 0.8), 3 * (0.5 - 0.3 / 0.8)]
    assert scale.grad.item() == pytest.approx(sum(inside) + 4 * 2**-7)
