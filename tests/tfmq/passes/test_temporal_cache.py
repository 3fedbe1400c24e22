"""Temporal features that are looked up: the tables, the choice between table and layer, and their checkpoint."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch

from tests.tfmq import networks
from tfmq.checkpoint import load_quantized, save_quantized
from tfmq.modules.cache import CachedProjection, cached_projections
from tfmq.network.backbone import backbone_of
from tfmq.network.unet import NoTimeEmbedding
from tfmq.packing import packed_bytes
from tfmq.passes.reconstruction import RoundingConfig
from tfmq.passes.temporal_cache import TemporalCache, temporal_feature_error
from tfmq.plan import quantized_layers
from tfmq.state import coverage


@cache
def network_and_pool():
    full = networks.unconditional()
    return full, networks.pool(full)


def quantized(precision="w4a8", caching=None, **settings):
    """A quantised network with finite-set calibration, its original, its backbone, the steps and the report."""
    full, pool = network_and_pool()
    passes = networks.recipe(scales="temporal", **settings)
    if caching is not None:
        passes = (TemporalCache(caching), *passes) if caching == "all" else (*passes, TemporalCache(caching))
    unet, _, _, report = networks.quantized(passes, precision, recorded=pool)
    return unet, full, backbone_of(full), pool.timesteps, report


def cached(unet, bits, caching):
    """Let ``unet`` look its temporal features up; the details of the report."""
    full, pool = network_and_pool()
    session = networks.session(unet, full, pool, f"w4a{bits}")
    networks.run(session, TemporalCache(caching))
    return session.report.details


class Recomputed(torch.nn.Module):
    """Computes a temporal feature in full precision and quantises it with torch's own kernel."""

    def __init__(self, full, path, column, backbone, timestep):
        super().__init__()
        feature = backbone.temporal_features(full, torch.tensor([timestep]))[column]
        low, high = feature.min().clamp_max(0), feature.max().clamp_min(0)
        scale = (high - low) / 255
        self.value = torch.fake_quantize_per_tensor_affine(feature, scale, torch.round(-low / scale).int(), 0, 255)

    def forward(self, x):
        return self.value.expand(len(x), -1)


@torch.no_grad()
def test_the_cache_gives_the_bits_of_computing_in_full_precision_and_quantising():
    unet, full, backbone, timesteps, _ = quantized(caching="all")
    x = networks.noise(3)
    for timestep in timesteps.tolist():
        twin = copy.deepcopy(unet)
        for column, path in enumerate(backbone.time_projections):
            twin.set_submodule(path, Recomputed(full, path, column, backbone, timestep))
        assert torch.equal(unet(x, timestep).sample, twin(x, timestep).sample)


def test_the_cache_drops_the_layers_it_replaces():
    computed, full, backbone, _, _ = quantized()
    unet, *_, report = quantized(caching="all")
    assert isinstance(unet.time_embedding, NoTimeEmbedding)
    assert set(cached_projections(unet)) == set(backbone.time_projections)
    assert not set(backbone.temporal) & set(quantized_layers(unet))
    assert packed_bytes(unet) < packed_bytes(computed)
    assert {row.kind for row in report.coverage if row.path in backbone.time_projections} == {"lookup table"}


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("caching", ["projection", "step"])
def test_selection_is_never_worse_than_either_choice_alone(caching, bits):
    computed, full, backbone, timesteps, _ = quantized("w8a8")
    steps = timesteps.unique()
    alone = temporal_feature_error(computed, full, backbone, steps)
    unet, table = copy.deepcopy(computed), copy.deepcopy(computed)
    cached(table, bits, "all")
    details = cached(unet, bits, caching)
    error, all_cached = (temporal_feature_error(u, full, backbone, steps) for u in (unet, table))
    assert torch.equal(all_cached.mean(0), torch.tensor(details["error_cached"], dtype=torch.float64))
    assert torch.equal(alone.mean(0), torch.tensor(details["error_computed"], dtype=torch.float64))
    if caching == "step":
        assert torch.equal(error, torch.minimum(alone, all_cached))
    else:
        assert torch.equal(error.mean(0), torch.minimum(alone.mean(0), all_cached.mean(0)))
    chosen = torch.tensor(details["cached"])
    assert torch.equal(torch.where(chosen.T, all_cached, alone), error)


@torch.no_grad()
def test_selection_keeps_the_layer_where_computing_is_better(tmp_path):
    """One layer's scale is spoilt at one step, so computing loses there; elsewhere it wins over coarse codes."""
    unet, full, backbone, timesteps, _ = quantized("w8a8")
    unet.get_submodule("time_embedding.linear_2").input_quantizer.scale[1] *= 50
    details = cached(unet, 6, "step")
    for steps in details["cached"]:
        assert steps[1] and not all(steps)
    assert all(table.layer is not None for table in cached_projections(unet).values())
    assert not isinstance(unet.time_embedding, NoTimeEmbedding)
    save_quantized(unet, tmp_path / "q.safetensors", {})
    x = networks.noise(5)
    assert torch.equal(load_quantized(tmp_path / "q.safetensors")(x, timesteps).sample, unet(x, timesteps).sample)
    embedding = torch.randn(5, 64, generator=networks.generator())
    for table in cached_projections(unet).values():
        unet.step_tracker.set(timesteps)
        looked_up, features = table.looked_up[unet.step_tracker.index], table.features(unet.step_tracker.index)
        expected = torch.where(looked_up[:, None], features, table.layer(embedding))
        assert torch.equal(table(embedding), expected)
        for row, timestep in enumerate(timesteps):
            unet.step_tracker.set(timestep)
            torch.testing.assert_close(table(embedding[row : row + 1])[0], expected[row])


@torch.no_grad()
@pytest.mark.parametrize("caching", ["all", "projection", "step"])
@pytest.mark.parametrize("precision", ["w8a8", "w4a32"])
def test_the_checkpoint_brings_the_tables_back(caching, precision, tmp_path):
    unet, _, _, timesteps, _ = quantized(precision, caching=caching, temporal=RoundingConfig(2))
    save_quantized(unet, tmp_path / "q.safetensors", {})
    loaded = load_quantized(tmp_path / "q.safetensors")
    x, steps = networks.noise(3), timesteps[[0, 2, 2]]
    assert torch.equal(unet(x, steps).sample, loaded(x, steps).sample)
    assert coverage(loaded) == coverage(unet)


def test_a_step_without_an_entry_is_refused():
    unet, *_ = quantized(caching="all")
    with pytest.raises(ValueError, match="calibrated for the"):
        unet(networks.noise(1), 3)


@torch.no_grad()
def test_at_32_activation_bits_the_cache_is_exact():
    unet, full, backbone, timesteps, _ = quantized("w4a32", caching="all")
    assert temporal_feature_error(unet, full, backbone, timesteps).abs().max() < 1e-12


@pytest.mark.parametrize("precision", ["w8a8", "w8a12"])
def test_an_empty_table_takes_the_features_given(precision):
    unet, _, backbone, timesteps, _ = quantized(precision, caching="all")
    table: CachedProjection = unet.get_submodule(backbone.time_projections[0])
    features = torch.linspace(-3, 5, len(timesteps) * table.codes.shape[1]).view(len(timesteps), -1)
    table.store(features)
    step = (features.amax(1).clamp_min(0) - features.amin(1).clamp_max(0)) / (2**table.bits - 1)
    assert ((table.features(torch.arange(len(timesteps))) - features).abs() <= 0.5001 * step[:, None]).all()
