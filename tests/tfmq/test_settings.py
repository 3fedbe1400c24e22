"""Settings that are misspelt or out of range are refused where they are written."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest

from tfmq.network.calibration import NormallyDistributed, Spaced
from tfmq.network.sampling import SamplingSettings
from tfmq.passes.activation_ranges import ActivationRanges
from tfmq.passes.block_reconstruction import BlockReconstruction
from tfmq.passes.correction import MeasureCorrection
from tfmq.passes.grids import Grids
from tfmq.passes.low_rank import LowRankBranches
from tfmq.passes.predicted_step_sizes import PredictedStepSizes
from tfmq.passes.reconstruction import RoundingConfig, StepSizeConfig
from tfmq.passes.step_network import FitConfig
from tfmq.passes.step_sizes import StepSizes
from tfmq.passes.temporal_cache import TemporalCache
from tfmq.passes.training import TrainingConfig
from tfmq.passes.weight_ranges import WeightRanges


@pytest.mark.parametrize(
    ("settings", "field", "value", "advice"),
    [
        (WeightRanges, "range", "serach", "did you mean 'search'\\? Allowed: minmax, search, thresholds"),
        (ActivationRanges, "range", "percentile", "Allowed: by_bits, minmax, search, thresholds"),
        (partial(LowRankBranches, 4, 3, 8), "range", "minmix", "did you mean 'minmax'\\? Allowed: minmax, search, "),
        (TemporalCache, "where", "projections", "did you mean 'projection'\\? Allowed: all, projection, step"),
        (TemporalCache, "where", None, "Allowed: all, projection, step"),
    ],
)
def test_a_misspelt_choice_names_the_nearest(settings, field, value, advice):
    with pytest.raises(ValueError, match=f"unknown {field} {value!r}: {advice}"):
        settings(**{field: value})


@pytest.mark.parametrize(
    ("settings", "given", "counts"),
    [
        (ActivationRanges, {}, ["batch"]),
        (BlockReconstruction, {}, ["batch", "memory_bytes"]),
        (StepSizes, {}, ["batch", "memory_bytes"]),
        (Grids, {"dynamic_activations": True}, ["weight_group"]),
        (PredictedStepSizes, {}, ["values", "batch"]),
        (MeasureCorrection, {}, ["images", "batch"]),
        (Spaced, {"steps": 1, "images": 1}, ["steps", "images"]),
        (NormallyDistributed, {"rows": 1, "mean": 0.4}, ["rows"]),
        (RoundingConfig, {}, ["iterations", "batch"]),
        (StepSizeConfig, {}, ["iterations", "batch"]),
        (TrainingConfig, {}, ["iterations", "batch"]),
        (FitConfig, {}, ["batch"]),
        (
            LowRankBranches,
            {"rank": 1, "candidates": 1, "search_rows": 1},
            ["rank", "candidates", "search_rows", "batch"],
        ),
        (SamplingSettings, {"steps": 1}, ["steps"]),
    ],
)
def test_counts_start_at_1(settings, given, counts):
    settings(**given)
    for name in counts:
        settings(**(given | {name: np.int64(2)}))
        for value in (0, -1, 2.0, "2", True):
            with pytest.raises(ValueError, match=f"{name} is {value!r}: it must be a whole number of at least 1"):
                settings(**(given | {name: value}))


@pytest.mark.parametrize(
    ("settings", "name", "allowed", "refused"),
    [
        (ActivationRanges, "momentum", [0, 0.95, 1, None], [-0.1, 1.5]),
        (partial(NormallyDistributed, 4), "mean", [0.4, -1], []),
        (partial(NormallyDistributed, 4, 0.4), "deviation", [0.4, None], []),
        (RoundingConfig, "learning_rate", [1e-3, 1], [0, -1e-3]),
        (RoundingConfig, "norm", [2], [0]),
        (RoundingConfig, "regularizer_weight", [0], [-1]),
        (RoundingConfig, "warmup", [0, 1], [-0.1, 1.1]),
        (StepSizeConfig, "learning_rate", [1e-3], [0]),
        (TrainingConfig, "network_learning_rate", [1e-3], [0]),
        (TrainingConfig, "weight_decay", [0], [-1]),
    ],
)
def test_numbers_keep_their_limits(settings, name, allowed, refused):
    for value in allowed:
        assert getattr(settings(**{name: value}), name) == value
    for value in (*refused, math.nan, math.inf, "1", True):
        with pytest.raises(ValueError, match=f"{name} is {value!r}: it must be a finite number"):
            settings(**{name: value})


def test_sampling_settings_keep_their_limits():
    for given in ({"eta": -0.1}, {"eta": math.nan}, {"guidance_scale": math.inf}, {"guidance_scale": None}):
        (name,) = given
        with pytest.raises(ValueError, match=f"{name} is .*: it must be a finite number"):
            SamplingSettings(steps=5, **given)
