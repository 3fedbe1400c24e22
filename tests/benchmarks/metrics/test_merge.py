import pytest
import torch

from benchmarks.metrics._frechet import moments
from benchmarks.metrics._merge import merge


def features(count):
    # Means far from zero, as after a ReLU, and of very different sizes: where sums of squares would cancel.
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 7, generator=generator) * torch.logspace(-2, 1, 7) + torch.linspace(0, 300, 7)


@pytest.mark.parametrize("sizes", [(500, 500), (997, 3), (2, 2, 996), (100,) * 10])
def test_parts_give_the_moments_of_all(sizes):
    whole = features(1000)
    merged, expected = merge(moments(part) for part in whole.split(sizes)), moments(whole)
    assert merged.count == 1000
    torch.testing.assert_close(merged.mean, expected.mean, rtol=1e-10, atol=0)
    torch.testing.assert_close(merged.covariance, expected.covariance, rtol=1e-10, atol=1e-10)


def test_one_part_stays_as_it_is():
    part = moments(features(10))
    assert merge([part]) is part
