"""Scales and codes of block formats, against ml_dtypes, tables worked by hand, and a search among all values."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch

from tfmq.numerics.block_scales import (
    block_grid,
    coarse_scale,
    e4m3_codes,
    e4m3_scales,
    e8m0_codes,
    e8m0_scales,
    in_blocks,
    out_of_blocks,
)

LARGEST = torch.tensor([1.0, 1.999, 2.0, 3.7, 0.3, 0.25, 0.249, 1e-6, 5e4, 448.0])


def test_a_power_of_two_is_the_one_below_the_largest_value():
    expected = [2.0 ** math.floor(math.log2(value)) for value in LARGEST.tolist()]
    codes = e8m0_codes(LARGEST)
    bits = codes.numpy().view(ml_dtypes.float8_e8m0fnu)
    assert bits.astype(np.float64).tolist() == expected
    assert e8m0_scales(codes, 8).tolist() == [value / 64 for value in expected]
    assert e8m0_scales(codes, 4).tolist() == [value / 4 for value in expected]


def test_mxint8_of_a_block_by_hand():
    """The largest is 1.99, so that X = 1 and codes count 1/64; 0.5/64 is halfway, and 127.4 is 127 after clipping."""
    block = torch.tensor([1.99, -1.5, 0.75, -0.0078125, 0.0234375, 0.01, 0.0, 1.0])
    scale = e8m0_scales(e8m0_codes(block.abs().max()), 8)
    codes = torch.round(block / scale).clamp(*block_grid(8, unsigned=False))
    assert codes.tolist() == [127, -96, 48, 0, 2, 1, 0, 64]
    assert e8m0_scales(e8m0_codes(torch.tensor(1.998)), 8) * block_grid(8, unsigned=False).qmax == 127 / 64


@pytest.mark.parametrize("value", [0.0, 1e-40, 1e-38])
def test_blocks_of_nothing_have_a_scale_that_can_be_divided_by(value):
    largest = torch.tensor([value, 1.0])
    for scale in (e8m0_scales(e8m0_codes(largest), 8), e4m3_scales(e4m3_codes(largest, 7, torch.tensor(1.0)), 1.0)):
        assert (scale > 1e-37).all() and (torch.zeros(2) / scale == 0).all()
    coarse = coarse_scale(torch.tensor(value), 7)
    assert coarse > 0 and e4m3_scales(e4m3_codes(torch.tensor(value), 7, coarse), coarse) > 0


def test_e4m3_rounds_as_another_library_does():
    values = torch.cat([torch.linspace(0.001, 448, 3000), 2.0 ** torch.linspace(-8.9, 8.7, 500)])
    codes = e4m3_codes(values * 7, 7, torch.tensor(1.0))
    expected = values.numpy().astype(ml_dtypes.float8_e4m3fn)
    positive = expected.astype(np.float32) > 0
    assert positive.mean() > 0.99
    assert (codes.numpy()[positive] == expected.view(np.uint8)[positive]).all()
    found = e4m3_scales(codes, torch.tensor(1.0)).numpy()
    assert (found[positive] == expected.astype(np.float32)[positive]).all()


def test_e4m3_by_hand():
    """From 1 the type has eighths, from 2 quarters, below 2^-6 steps of 2^-9; half-way goes to the even one."""
    table = {1.06: 1.0, 1.0625: 1.0, 1.07: 1.125, 1.1875: 1.25, 2.1: 2.0, 2.13: 2.25, 17.0: 16.0, 0.003: 0.00390625}
    for value, expected in table.items():
        codes = e4m3_codes(torch.tensor(value * 7), 7, torch.tensor(1.0))
        assert e4m3_scales(codes, torch.tensor(1.0)).item() == expected


def test_with_the_coarse_scale_the_largest_block_has_the_largest_e4m3():
    largest = torch.tensor([0.5, 1e-3, 7e-5, 0.499])
    coarse = coarse_scale(largest.max(), 7)
    scales = e4m3_scales(e4m3_codes(largest, 7, coarse), coarse)
    torch.testing.assert_close(scales[0], torch.tensor(0.5 / 7), rtol=1e-6, atol=0)
    # Of three mantissa bits the relative error is a sixteenth at most; below 2^-6 of the coarse scale it is not.
    torch.testing.assert_close(scales[:2] * 7, largest[:2], rtol=1 / 16, atol=0)
    assert (scales / coarse).tolist()[0] == pytest.approx(448)


def test_grids():
    assert block_grid(8, unsigned=False) == (-127, 127) and block_grid(4, unsigned=False) == (-7, 7)
    assert block_grid(4, unsigned=True) == (0, 15)


@pytest.mark.parametrize("size", [6, 7, 8, 3])
def test_blocks_are_consecutive_and_come_back(size):
    x = torch.arange(2.0 * size * 3).view(2, size, 3) + 1
    blocks = in_blocks(x, 1, 4)
    assert blocks.shape == (2, -(-size // 4), 4, 3)
    assert torch.equal(blocks[:, 0, : min(size, 4)], x[:, :4]) and (blocks[:, -1, size % 4 or 4 :] == 0).all()
    assert torch.equal(out_of_blocks(blocks, 1, size), x)
