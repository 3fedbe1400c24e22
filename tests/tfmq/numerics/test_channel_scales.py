"""Joint factors of channels, against examples worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from tfmq.numerics.channel_scales import channel_largest, joint_factors, step_groups


def test_steps_are_split_evenly_and_in_order():
    assert step_groups(20, 4).tolist() == [0] * 5 + [1] * 5 + [2] * 5 + [3] * 5
    assert step_groups(5, 2).bincount().tolist() == [3, 2]
    assert step_groups(3, 10).tolist() == [0, 1, 2]


def test_one_group_of_full_strength_makes_ranges_even():
    largest = torch.tensor([[1.0, 4.0, 2.0]])
    found = joint_factors(largest, torch.tensor([1.0, 5.0, 0.1]), strength=1.0, most=10.0)
    torch.testing.assert_close(largest[0] / found, torch.full((3,), 2.0))  # their geometric mean


def test_groups_are_weighted_by_the_range_of_the_channel():
    # Group 0: ranges 1 and 4, geometric mean 2, so 1/2 and 2. Group 1: 9 and 1, mean 3, so 3 and 1/3.
    # Channel 0: (1 * 1/2 + 9 * 3) / 10 = 2.75. Channel 1: (4 * 2 + 1 * 1/3) / 5 = 5/3.
    found = joint_factors(torch.tensor([[1.0, 4.0], [9.0, 1.0]]), torch.ones(2), strength=1.0, most=10.0)
    expected = torch.tensor([2.75, 5 / 3])
    torch.testing.assert_close(found, expected / math.sqrt(2.75 * 5 / 3))


def test_half_strength_is_smoothquants_factor():
    largest, weight = torch.tensor([8.0, 2.0, 1.0]), torch.tensor([0.5, 2.0, 1.0])
    expected = (largest / weight).sqrt()
    found = joint_factors(largest[None], weight, strength=0.5, most=10.0)
    torch.testing.assert_close(found, expected / expected.prod() ** (1 / 3))


def test_factors_are_cut_and_a_channel_of_zeros_has_none():
    largest = torch.tensor([[1e-4, 1.0, 1e4, 0.0, 5.0], [2e-4, 1.0, 1e4, 0.0, 5.0]])
    found = joint_factors(largest, torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0]), strength=1.0, most=10.0)
    assert found.tolist() == pytest.approx([0.1, found[1].item(), 10.0, 1.0, 1.0])
    assert torch.isfinite(found).all() and (found > 0).all()


def test_a_channel_that_sleeps_in_one_group_takes_its_factor_from_the_other():
    found = joint_factors(torch.tensor([[0.0, 1.0], [4.0, 1.0]]), torch.ones(2), strength=1.0, most=10.0)
    # Group 1 alone speaks for channel 0: 4 / 2. Channel 1 is 1 in group 0, and 1 / 2 in group 1: 3 / 4.
    expected = torch.tensor([2.0, 0.75])
    torch.testing.assert_close(found, expected / math.sqrt(1.5))


@pytest.mark.parametrize(("shape", "dim"), [((3, 5, 4, 4), 1), ((3, 7, 5), -1), ((3, 5), -1), ((3, 2, 2, 5), -1)])
def test_the_largest_of_each_channel_is_taken_in_each_row(shape, dim):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    channels = x.movedim(dim, 1)
    expected = [[channels[row, channel].abs().max() for channel in range(5)] for row in range(3)]
    assert torch.equal(channel_largest(x, dim), torch.tensor(expected))
