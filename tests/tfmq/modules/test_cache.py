import copy
from functools import cache

import pytest
import torch
from tfmq.passes.temporal import cache_temporal_features, temporal_feature_error

from tests.tfmq import networks
from tfmq.checkpoint import load_quantized, packed_bytes, save_quantized
from tfmq.modules.cache import CachedProjection, NoTimeEmbedding, cached_projections
from tfmq.network.unet import UNetLayout, temporal_features
from tfmq.passes.reconstruction import RoundingConfig
from tfmq.plan import SHARED, Protocol, coverage, plan_for, quantized_layers
from tfmq.precision import Precision
from tfmq.quantization import QuantizationConfig, quantize_


@cache
def network_and_pool():
    full = networks.unconditional()
    return full, networks.pool(full)


def quantized(precision="w4a8", protocol=SHARED, **settings):
    """A quantised network, its full-precision original, its layout, the steps and the report."""
    full, pool = network_and_pool()
    unet, layout = copy.deepcopy(full), UNetLayout.of(full)
    rows = pool.spaced(pool.steps, 4)
    config = QuantizationConfig(activation_scales="temporal", **settings)
    parsed = Precision.parse(precision)
    report = quantize_(unet, parsed, config, rows, rows, pool.timesteps, networks.generator(), protocol)
    return unet, full, layout, pool.timesteps, report


class Recomputed(torch.nn.Module):
    """Computes a temporal feature in full precision and quantises it with torch's own kernel."""

    def __init__(self, full, path, column, layout, timestep):
        super().__init__()
        feature = temporal_features(full, layout, torch.tensor([timestep]))[column]
        low, high = feature.min().clamp_max(0), feature.max().clamp_min(0)
        scale = (high - low) / 255
        self.value = torch.fake_quantize_per_tensor_affine(feature, scale, torch.round(-low / scale).int(), 0, 255)

    def forward(self, x):
        return self.value.expand(len(x), -1)


@torch.no_grad()
def test_the_cache_gives_the_bits_of_computing_in_full_precision_and_quantising():
    unet, full, layout, timesteps, _ = quantized(caching="all")
    x = networks.noise(3)
    for timestep in timesteps.tolist():
        twin = copy.deepcopy(unet)
        for column, path in enumerate(layout.time_projections):
            twin.set_submodule(path, Recomputed(full, path, column, layout, timestep))
        assert torch.equal(unet(x, timestep).sample, twin(x, timestep).sample)


def test_the_cache_drops_the_layers_it_replaces():
    computed, full, layout, _, _ = quantized()
    unet, *_, report = quantized(caching="all")
    assert isinstance(unet.time_embedding, NoTimeEmbedding)
    assert set(cached_projections(unet)) == set(layout.time_projections)
    assert not set(layout.temporal) & set(quantized_layers(unet))
    assert packed_bytes(unet) < packed_bytes(computed)
    assert {row.kind for row in report.coverage if row.path in layout.time_projections} == {"lookup table"}


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("caching", ["projection", "step"])
def test_selection_is_never_worse_than_either_choice_alone(caching, bits):
    computed, full, layout, timesteps, _ = quantized("w8a8")
    steps = timesteps.unique()
    alone = temporal_feature_error(computed, full, layout, steps)
    unet, cached = copy.deepcopy(computed), copy.deepcopy(computed)
    cache_temporal_features(cached, full, layout, bits, "all")
    details = cache_temporal_features(unet, full, layout, bits, caching)
    error, all_cached = (temporal_feature_error(u, full, layout, steps) for u in (unet, cached))
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
    unet, full, layout, timesteps, _ = quantized("w8a8")
    unet.get_submodule("time_embedding.linear_2").input_quantizer.scale[1] *= 50
    details = cache_temporal_features(unet, full, layout, 6, "step")
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
    unet, full, layout, timesteps, _ = quantized("w4a32", caching="all")
    assert temporal_feature_error(unet, full, layout, timesteps).abs().max() < 1e-12


def test_frozen_temporal_layers_are_rounded_to_nearest_in_their_min_max_ranges():
    unet, full, layout, _, _ = quantized(freeze_temporal=True, rounding=RoundingConfig(3))
    for path in layout.temporal:
        weight = full.get_submodule(path).weight.detach()
        low, high = weight.amin(1).clamp_max(0), weight.amax(1).clamp_min(0)
        scale = (high - low) / 15
        expected = torch.fake_quantize_per_channel_affine(weight, scale, torch.round(-low / scale).int(), 0, 0, 15)
        torch.testing.assert_close(unet.get_submodule(path).weight, expected, rtol=1e-5, atol=1e-6)


def test_a_protocol_decides_what_is_quantised():
    full = networks.unconditional()
    layout = UNetLayout.of(full)
    bits = {"boundary": 8, "shortcuts": 32, "attention_products": 32, "time_embedding": 8, "first_time_layer": 32}
    plan = plan_for(full, layout, Precision.parse("w4a4"), Protocol("published", bits))
    assert plan.layers["conv_in"].weight_bits == plan.layers["conv_out"].activation_bits == 8
    assert plan.layers["time_embedding.linear_2"].weight_bits == 8 and "time_embedding.linear_1" not in plan.layers
    assert layout.shortcuts and not set(layout.shortcuts) & set(plan.layers) and not plan.attentions
    assert "shortcuts" in plan.reasons[layout.shortcuts[0]]
    assert plan.layers[layout.downsampling[0]].weight_bits == plan.layers[layout.attention_layers[0]].weight_bits == 4
    with pytest.raises(ValueError, match="shortcutz"):
        plan_for(full, layout, Precision.parse("w4a4"), Protocol("published", {"shortcutz": 32}))


def test_what_a_protocol_leaves_out_is_in_the_coverage_with_its_reason():
    protocol = Protocol("published", {"time_embedding": 32, "time_projections": 32})
    unet, full, layout, timesteps, report = quantized(protocol=protocol, rounding=RoundingConfig(2))
    left = {row.path: row.reason for row in report.coverage if row.reason}
    assert set(left) == set(layout.temporal) and all("protocol published" in reason for reason in left.values())
    assert temporal_feature_error(unet, full, layout, timesteps).abs().max() < 1e-12


@pytest.mark.parametrize("precision", ["w8a8", "w8a12"])
def test_an_empty_table_takes_the_features_given(precision):
    unet, _, layout, timesteps, _ = quantized(precision, caching="all")
    table: CachedProjection = unet.get_submodule(layout.time_projections[0])
    features = torch.linspace(-3, 5, len(timesteps) * table.codes.shape[1]).view(len(timesteps), -1)
    table.store(features)
    step = (features.amax(1).clamp_min(0) - features.amin(1).clamp_max(0)) / (2**table.bits - 1)
    assert ((table.features(torch.arange(len(timesteps))) - features).abs() <= 0.5001 * step[:, None]).all()
