"""Margins around the ranges of activations."""

from __future__ import annotations

import pytest
import torch

from tests.tfmq import networks
from tfmq.passes.range_margin import RangeMargin
from tfmq.plan import activation_quantizers


def ends(network):
    """The range of each quantiser at each step, by path: (S, 2)."""
    found = {}
    for path, quantizer in activation_quantizers(network).items():
        grid, scale, point = quantizer.grid, quantizer.scale, quantizer.zero_point
        found[path] = torch.stack([scale * (grid.qmin - point), scale * (grid.qmax - point)], 1)
    return found


@pytest.mark.parametrize("scales", ["shared", "per_step"])
def test_both_ends_move_by_the_margin_and_probabilities_keep_their_range(scales):
    recipe = networks.recipe(scales=scales)
    plain, *_ = networks.quantized(recipe)
    wide, *_ = networks.quantized((*recipe, RangeMargin(0.25)))
    before, after = ends(plain), ends(wide)
    positive = {path for path, quantizer in activation_quantizers(wide).items() if quantizer.positive}
    assert positive and positive < set(before)
    for path, found in before.items():
        expected = found if path in positive else 1.25 * found
        torch.testing.assert_close(after[path], expected, rtol=1e-5, atol=0)


def test_few_bits_keep_their_ranges():
    recipe = networks.recipe()
    plain, *_ = networks.quantized(recipe, "w4a4")
    wide, *_ = networks.quantized((*recipe, RangeMargin(0.25)), "w4a4")
    bits = {path: quantizer.bits for path, quantizer in activation_quantizers(wide).items()}
    before, after = ends(plain), ends(wide)
    changed = {path for path in before if not torch.equal(before[path], after[path])}
    assert changed == {path for path, width in bits.items() if width == 8} and 4 in bits.values()


def test_a_margin_below_0_is_refused():
    with pytest.raises(ValueError, match="margin is -0.1: it must be a finite number, from 0"):
        RangeMargin(-0.1)
