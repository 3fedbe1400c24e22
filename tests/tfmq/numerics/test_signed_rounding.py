"""Rounding with learned offsets and ranges, against autograd in float64 with rounding passed straight through."""

import pytest
import torch

from tfmq.numerics.affine import fake_quantize
from tfmq.numerics.signed_rounding import AutoRound


def grouped(per_group):
    """Two groups of input channels, of 3 and 4."""
    return per_group.repeat_interleave(torch.tensor([3, 4]), 1)


def rounding_of(bits, symmetric=False, spread=lambda per_group: per_group, groups=1):
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parts = [weight] if groups == 1 else weight.split([3, 4], 1)
    low = torch.stack([part.amin(1).clamp_max(0) for part in parts], 1)
    high = torch.stack([part.amax(1).clamp_min(0) for part in parts], 1)
    return AutoRound(weight, low, high, bits, symmetric, spread)


def straight(x):
    return x + (torch.round(x) - x).detach()


def moved(rounding):
    """The rounding away from its start, so that the grid clips some weights on either side."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        rounding.offset.copy_(torch.rand(5, 7, generator=generator, dtype=torch.float64) - 0.5)
        rounding.low_share.mul_(0.6 + 0.3 * torch.rand(rounding.low_share.shape, generator=generator))
        rounding.high_share.mul_(0.6 + 0.3 * torch.rand(rounding.high_share.shape, generator=generator))
    return rounding


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [3, 8])
def test_starts_at_round_to_nearest_in_its_ranges(bits, symmetric):
    rounding = rounding_of(bits, symmetric)
    scale, zero_point = rounding.ranges()
    nearest = fake_quantize(rounding.weight, scale.detach(), zero_point.detach(), rounding.grid)
    assert torch.equal(rounding().detach(), nearest)
    assert torch.equal((rounding.codes() - zero_point) * scale, nearest)
    assert rounding.codes().min() >= 0 and rounding.codes().max() <= 2**bits - 1
    assert (zero_point == zero_point.round()).all()


@pytest.mark.parametrize(("groups", "spread"), [(1, lambda per_group: per_group), (2, grouped)])
def test_gradients_are_those_of_the_equations(groups, spread):
    rounding = moved(rounding_of(3, spread=spread, groups=groups))
    target = torch.randn(5, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    offset, low, high = (part.detach().clone().requires_grad_() for part in rounding.learned)
    least, most = low * rounding.low, high * rounding.high
    scale = (most - least) / 7
    zero_point = spread(straight(-least / scale))
    codes = straight(rounding.weight / spread(scale) + offset) + zero_point
    # Clipping passes the gradient of a code at an end of the grid, which torch's clamp has not done since 2.14.
    clipped = torch.where(codes < -0.5, 0.0, torch.where(codes > 7.5, 7.0, codes))
    assert (clipped < codes).any() and (clipped > codes).any()
    expected = spread(scale) * (clipped - zero_point)
    found = rounding()
    torch.testing.assert_close(found, expected)
    ((expected - target) ** 2).sum().backward()
    ((found - target) ** 2).sum().backward()
    for part, wanted in zip(rounding.learned, (offset, low, high), strict=True):
        torch.testing.assert_close(part.grad, wanted.grad)


def test_a_step_moves_by_the_rate_and_stays_in_bounds():
    rounding = rounding_of(4)
    for part in rounding.learned:
        part.grad = torch.zeros_like(part)
        part.grad.view(-1)[:2] = torch.tensor([1e-9, -1e3], dtype=torch.float64)
    rounding.step(0.3)
    assert rounding.offset.view(-1)[:3].tolist() == [-0.3, 0.3, 0]
    assert rounding.low_share.view(-1)[:3].tolist() == rounding.high_share.view(-1)[:3].tolist() == [0.7, 1, 1]
    for part in rounding.learned:
        part.grad = torch.ones_like(part)
    for _ in range(5):
        rounding.step(0.3)
    assert rounding.offset.min() == -0.5 and rounding.high_share.max() <= 0.7 and rounding.low_share.min() >= 0


def test_a_range_that_is_drawn_to_nothing_stays_finite():
    rounding = rounding_of(4)
    with torch.no_grad():
        rounding.low_share.zero_()
        rounding.high_share.zero_()
    rounding().sum().backward()
    assert torch.isfinite(rounding().detach()).all()
    assert all(torch.isfinite(part.grad).all() for part in rounding.learned)
