"""Settings that are misspelt or out of range are refused where they are written."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tfmq.network.sampling import SamplingSettings
from tfmq.passes.low_rank import LowRankConfig
from tfmq.passes.reconstruction import RoundingConfig, StepSizeConfig
from tfmq.passes.step_network import FitConfig
from tfmq.passes.training import TrainingConfig
from tfmq.quantization import QuantizationConfig


@pytest.mark.parametrize(
    ("field", "value", "advice"),
    [
        ("weight_range", "serach", "did you mean 'search'\\? Allowed: minmax, search, thresholds"),
        ("activation_range", "percentile", "Allowed: minmax, search, thresholds"),
        ("activation_scales", "perstep", "did you mean 'per_step'\\? Allowed: per_step, shared, temporal"),
        ("activation_scales", None, "Allowed: per_step, shared, temporal"),
        ("caching", "projections", "did you mean 'projection'\\? Allowed: None, all, projection, step"),
    ],
)
def test_a_misspelt_choice_names_the_nearest(field, value, advice):
    with pytest.raises(ValueError, match=f"unknown {field} {value!r}: {advice}"):
        QuantizationConfig(**{field: value})


@pytest.mark.parametrize(
    ("settings", "given", "counts"),
    [
        (QuantizationConfig, {}, ["activation_batch", "batch", "memory_bytes", "weight_group"]),
        (RoundingConfig, {}, ["iterations", "batch"]),
        (StepSizeConfig, {}, ["iterations", "batch"]),
        (TrainingConfig, {}, ["iterations", "batch"]),
        (FitConfig, {}, ["batch"]),
        (LowRankConfig, {"rank": 1, "candidates": 1, "search_rows": 1}, ["rank", "candidates", "search_rows"]),
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
        (QuantizationConfig, "activation_momentum", [0, 0.95, 1, None], [-0.1, 1.5]),
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
