"""The settings that the block-wise methods share: what each adds to the recipe, and what is refused."""

from __future__ import annotations

import pytest

from baselines._brecq import Config
from tfmq.network.calibration import Spaced
from tfmq.passes.activation_ranges import ActivationRanges
from tfmq.passes.block_reconstruction import BlockReconstruction
from tfmq.passes.leave_out import LeaveOut
from tfmq.passes.temporal_cache import TemporalCache
from tfmq.passes.temporal_reconstruction import TemporalReconstruction


@pytest.mark.parametrize(
    ("field", "value", "advice"),
    [
        ("activation_range", "percentile", "Allowed: by_bits, minmax, search, thresholds"),
        ("activation_scales", "perstep", "did you mean 'per_step'\\? Allowed: per_step, shared, temporal"),
        ("activation_scales", None, "Allowed: per_step, shared, temporal"),
        ("caching", "projections", "did you mean 'projection'\\? Allowed: None, all, projection, step"),
        ("temporal", "block", "did you mean 'blocks'\\? Allowed: blocks, frozen, full_precision, joint"),
    ],
)
def test_a_misspelt_choice_names_the_nearest(field, value, advice):
    with pytest.raises(ValueError, match=f"unknown {field} {value!r}: {advice}"):
        Config(**{field: value})


BASE = ["weight ranges", "block reconstruction", "activation ranges"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, BASE),
        ({"split_shortcuts": True}, ["grids", *BASE]),
        ({"temporal": "full_precision"}, ["leave out", *BASE]),
        ({"temporal": "frozen"}, [BASE[0], "freeze temporal", *BASE[1:]]),
        ({"temporal": "joint"}, [BASE[0], "temporal reconstruction", *BASE[1:]]),
        ({"activation_scales": "temporal"}, [*BASE[:2], "finite set calibration", BASE[2]]),
        ({"activation_scales": "per_step"}, BASE),
        ({"activation_iterations": 5}, [*BASE, "step sizes"]),
        ({"caching": "all"}, ["temporal cache", *BASE]),
        ({"caching": "projection", "activation_iterations": 5}, [*BASE, "step sizes", "temporal cache"]),
    ],
)
def test_each_setting_is_a_pass_in_its_place(settings, expected):
    assert [step.name for step in Config(**settings).recipe()] == expected


def test_settings_reach_their_passes():
    config = Config(
        steps=3,
        images=4,
        range_steps=None,
        range_images=5,
        iterations=6,
        learning_rate=0.5,
        batch=7,
        temporal="joint",
        temporal_iterations=8,
        activation_scales="per_step",
        activation_range="search",
        momentum=0.25,
        range_batch=9,
        caching="step",
        memory_gib=0.5,
    )
    found = {type(step): step for step in config.recipe()}
    blocks, temporal, ranges = (found[k] for k in (BlockReconstruction, TemporalReconstruction, ActivationRanges))
    assert blocks.data == Spaced(3, 4) and blocks.memory_bytes == 2**29
    assert (blocks.rounding.iterations, blocks.rounding.learning_rate, blocks.rounding.batch) == (6, 0.5, 7)
    assert (temporal.rounding.iterations, temporal.rounding.learning_rate) == (8, 0.5)
    assert ranges == ActivationRanges(Spaced(None, 5, shuffled=True), "search", 0.25, 9, per_step=True)
    assert found[TemporalCache].where == "step"
    (left_out, *_) = Config(temporal="full_precision").recipe()
    assert left_out == LeaveOut(("time_embedding", "time_projections"))
