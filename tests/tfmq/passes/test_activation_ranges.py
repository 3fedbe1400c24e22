"""Ranges of activations in a whole network: which have a table over time steps, and the progress bar."""

from __future__ import annotations

import pytest
import torch

from tests.tfmq import networks
from tfmq.network.backbone import backbone_of
from tfmq.passes import activation_ranges
from tfmq.passes.temporal_cache import temporal_feature_error
from tfmq.plan import activation_quantizers


@pytest.mark.parametrize("precision", ["w4a8", "w8a8"])
def test_finite_set_calibration_lowers_the_temporal_feature_error(precision):
    errors = {}
    for scales in ("shared", "temporal", "per_step"):
        unet, full, pool, _ = networks.quantized(networks.recipe(scales=scales), precision)
        errors[scales] = temporal_feature_error(unet, full, backbone_of(full), pool.timesteps)
        tables = {path for path, quantizer in activation_quantizers(unet).items() if quantizer.per_step}
        temporal = set(backbone_of(full).temporal)
        inside = {path for path in tables if path.removesuffix(".input_quantizer") in temporal}
        if scales == "shared":
            assert not tables
        else:
            assert len(inside) == len(temporal)
            assert tables == (inside if scales == "temporal" else set(activation_quantizers(unet)))
    assert errors["temporal"].shape == (5, len(backbone_of(networks.unconditional()).time_projections))
    assert errors["temporal"].mean() < errors["shared"].mean()
    torch.testing.assert_close(errors["temporal"], errors["per_step"])


@pytest.mark.parametrize("scales", ["shared", "per_step"])
def test_the_progress_bar_knows_its_total(scales, monkeypatch):
    seen = {}

    def bar(items, desc, total=None, disable=None):
        items = list(items)
        seen[desc] = (len(items), len(items) if total is None else total)
        return items

    monkeypatch.setattr(activation_ranges, "tqdm", bar)
    networks.quantized(networks.recipe(scales=scales, batch=3))
    assert seen["activation ranges"] == ((7, 7) if scales == "shared" else (10, 10))
