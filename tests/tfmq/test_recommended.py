"""The recommended recipe is better than rounding to nearest on every kind of network."""

from __future__ import annotations

import copy

import pytest
import torch

import tfmq
from tests.tfmq import networks
from tfmq.network.backbone import evaluate

NEAREST = (tfmq.WeightRanges("minmax"), tfmq.RoundToNearest(), tfmq.ActivationRanges(tfmq.Spaced(None, 16)))


@pytest.mark.parametrize("kind", networks.KINDS)
def test_it_is_better_than_rounding_to_nearest(kind):
    kind = networks.KINDS[kind]
    full = kind.build()
    pool = kind.pool(full, 16)
    test = kind.pool(full, 20).rows(torch.arange(5).repeat(4), torch.arange(16, 20).repeat_interleave(5))
    errors = []
    for recipe in (NEAREST, tfmq.recommended_recipe(160, 8, tuning_iterations=20)):
        network = copy.deepcopy(full)
        tfmq.quantize_(network, tfmq.Precision.parse("w4a8"), recipe, pool, torch.Generator().manual_seed(0))
        with torch.no_grad():
            found, exact = (evaluate(each, test.latents, test.timesteps, test.context) for each in (network, full))
        errors.append(((found - exact).norm() / exact.norm()).item())
    assert errors[1] < 0.9 * errors[0], errors


def test_it_is_kept(tmp_path):
    network = networks.unconditional()
    pool = networks.pool(network, 8)
    recipe = tfmq.recommended_recipe(32, 4, tuning_iterations=2)
    tfmq.quantize_(network, tfmq.Precision.parse("w8a8"), recipe, pool, torch.Generator().manual_seed(0))
    tfmq.save_quantized(network, tmp_path / "w8a8.safetensors", {})
    rows = networks.ALL_ROWS(pool, torch.Generator())
    with torch.no_grad():
        kept, there = (
            evaluate(each, rows.latents, rows.timesteps, None)
            for each in (tfmq.load_quantized(tmp_path / "w8a8.safetensors"), network)
        )
    assert torch.equal(kept, there)


def test_numbers_out_of_range_are_refused():
    for wrong, text in (
        ({"tuning_iterations": -1}, "tuning_iterations is -1: it must be a whole number of at least 0"),
        ({"tuning_iterations": 1.5}, "tuning_iterations is 1.5: it must be a whole number of at least 0"),
        ({"tuning_iterations": "1"}, "tuning_iterations is '1': it must be a whole number of at least 0"),
        ({"rows": 0}, "rows is 0: it must be a whole number of at least 2"),
        ({"range_images": 0}, "images is 0"),
        ({"batch": 0}, "batch is 0: it must be a whole number of at least 1"),
    ):
        with pytest.raises(ValueError, match=text):
            tfmq.recommended_recipe(**wrong)


def test_a_batch_bounds_the_memory():
    network = networks.unconditional()
    pool = networks.pool(network, 4)
    network.to("meta")
    recipes = (tfmq.recommended_recipe(batch=2), tfmq.recommended_recipe())
    few, all_at_once = (tfmq.plan_cost(network, tfmq.Precision.parse("w4a4"), each, pool) for each in recipes)
    held = [[memory.held for memory in planned.memories if memory is not None] for planned in (few, all_at_once)]
    assert all(small < large / 1.5 for small, large in zip(*held, strict=True) if large)
