"""Learning again on the quantised network's own trajectories, which are those that the stock pipeline would take."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

from tests.tfmq import networks
from tfmq.network.backbone import backbone_of
from tfmq.network.calibration import Spaced, collect_calibration
from tfmq.network.sampling import SamplingSettings, predict_noise, sample
from tfmq.passes import recalibration
from tfmq.passes.channel_scales import ScaleChannels
from tfmq.passes.low_rank import LowRankBranches
from tfmq.passes.recalibration import Recalibration, half_way, resampled
from tfmq.passes.reconstruction import RoundingConfig, StepSizeConfig
from tfmq.plan import activation_quantizers, quantized_layers
from tfmq.precision import Precision
from tfmq.quantization import quantize_
from tfmq.workspace import FolderWorkspace

# Fast enough that two steps take a rounding to the other side.
ROUNDING = RoundingConfig(iterations=2, batch=4, learning_rate=0.5)
SHORT = Recalibration(1, ROUNDING, StepSizeConfig(2, 4), Spaced(5, 4), batch=8)


def quantized(*passes, precision="w4a4", kind="unconditional"):
    kind = networks.KINDS[kind]
    unet = kind.build()
    full = copy.deepcopy(unet)
    pool = kind.pool(full)
    report = quantize_(unet, Precision.parse(precision), (*networks.recipe(), *passes), pool, networks.generator())
    return unet, full, pool, report


@torch.no_grad()
def test_new_rows_lie_on_the_trajectories_of_the_quantised_network():
    unet, full, pool, _ = quantized()
    found = resampled(unet, pool, 3, 3, networks.generator())
    scheduler, latents = networks.scheduler(), networks.noise()[:3]
    scheduler.set_timesteps(5)
    for index, timestep in enumerate(scheduler.timesteps):
        torch.testing.assert_close(found.latents[index], latents)
        latents = scheduler.step(unet(latents, timestep).sample, timestep, latents).prev_sample
    torch.testing.assert_close(found.samples, latents)
    assert torch.equal(found.latents[0], pool.latents[0, :3]), "both begin with the same noise"
    drift = (found.latents - pool.latents[:, :3]).flatten(2).norm(dim=2).mean(1)
    assert (drift[1:] > 0).all() and drift[-1] > drift[1], "and part from then on"
    of_full = resampled(full, pool, 4, 4, networks.generator())
    torch.testing.assert_close(of_full.latents, pool.latents)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["class", "text"])
def test_conditions_guidance_and_schedule_are_those_of_the_pool(kind):
    kind = networks.KINDS[kind]
    unet = kind.build()
    pool = kind.pool(unet)
    again = resampled(unet, pool, pool.images, 4, networks.generator())
    torch.testing.assert_close(again.latents, pool.latents, rtol=1e-4, atol=1e-5)
    assert torch.equal(again.context, pool.context) and torch.equal(again.unconditional, pool.unconditional)
    assert torch.equal(again.timesteps, pool.timesteps) and again.settings == pool.settings


@torch.no_grad()
def test_noise_is_found_again_where_a_schedule_scales_it():
    unet = networks.unconditional()
    scheduler = EulerDiscreteScheduler.from_config(networks.scheduler().config)
    pool = collect_calibration(unet, scheduler, networks.noise(), networks.SETTINGS, batch=4)
    again = resampled(unet, pool, 4, 4, networks.generator())
    torch.testing.assert_close(again.latents, pool.latents, rtol=1e-4, atol=1e-5)
    expected = sample(unet, scheduler, networks.noise(), networks.SETTINGS)
    torch.testing.assert_close(again.samples, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_steps_that_add_noise_draw_it_from_the_generator():
    unet = networks.unconditional()
    settings = SamplingSettings(steps=5, eta=1.0)
    added = torch.randn(5, 4, 3, 8, 8, generator=networks.generator())
    pool = collect_calibration(unet, networks.scheduler(), networks.noise(), settings, batch=4, step_noise=added)
    again = resampled(unet, pool, 4, 4, networks.generator())
    torch.testing.assert_close(again.latents, pool.latents)
    other = resampled(unet, pool, 4, 4, torch.Generator().manual_seed(1))
    assert (other.latents[1] - pool.latents[1]).abs().max() > 0.01


def test_rounds_learn_on_new_rows_from_targets_in_full_precision(monkeypatch):
    seen = []

    def recorded(network, pool, images, batch, generator):
        found = resampled(network, pool, images, batch, generator)
        seen.append((copy.deepcopy(network.state_dict()), found))
        return found

    monkeypatch.setattr(recalibration, "resampled", recorded)
    unet, full, pool, report = quantized(replace(SHORT, rounds=2))
    assert len(seen) == 2
    first, second = (state for state, _ in seen)
    codes = [name for name in first if name.endswith("codes")]
    assert any(not torch.equal(first[name], second[name]) for name in codes), (
        "the second round samples what was learned"
    )
    assert (seen[0][1].latents[1:] - seen[1][1].latents[1:]).abs().max() > 0
    assert report.passes[-1].name == "recalibration"


@pytest.mark.parametrize("precision", ["w4a8", "w4a32"])
def test_what_it_learns_and_what_it_leaves(precision):
    usual = networks.recipe() if precision == "w4a8" else networks.recipe()[:-1]
    before, full, pool, _ = networks.quantized(usual, precision)
    learning = replace(SHORT, rounding=RoundingConfig(40, 16, 0.05))
    after, *_ = networks.quantized((*usual, learning), precision, recorded=pool)
    fixed = recalibration.fixed_on_any_trajectory(backbone_of(full))
    moved = {
        path
        for path, layer in quantized_layers(after).items()
        if not torch.equal(layer.codes, quantized_layers(before)[path].codes)
    }
    assert moved and not moved & fixed
    for path, layer in quantized_layers(after).items():
        assert torch.equal(layer.weight_scale, quantized_layers(before)[path].weight_scale) and layer.consistent
    scales = {path: quantizer.scale for path, quantizer in activation_quantizers(before).items()}
    learned = {path for path, q in activation_quantizers(after).items() if not torch.equal(q.scale, scales[path])}
    stay = {path for path in scales if path.removesuffix(".input_quantizer") in fixed}
    # A scale that would fall below 0 in two steps, as those of small probabilities may, stays where it was.
    assert not learned & stay and len(learned) >= 0.8 * len(set(scales) - stay)


def test_a_round_brings_the_trajectory_nearer_to_full_precision():
    learning = replace(SHORT, rounding=RoundingConfig(40, 16, 0.05), step_sizes=None)
    errors = []
    for passes in ((), (learning,)):
        unet, full, pool, _ = quantized(*passes, precision="w3a4")
        with torch.no_grad():
            found = resampled(unet, pool, 4, 4, networks.generator())
            parts = []
            for step, latents in zip(found.timesteps, found.latents, strict=True):
                expected = predict_noise(full, latents, step, None, 1.0)
                parts.append((predict_noise(unet, latents, step, None, 1.0) - expected).norm() / expected.norm())
        errors.append(torch.stack(parts).mean())
    assert errors[1] < errors[0]


def test_roundings_start_between_the_weight_and_its_code():
    unet, full, pool, _ = quantized(precision="w4a8")
    layer, weight = unet.mid_block.resnets[0].conv1, full.mid_block.resnets[0].conv1.weight
    codes, rounded = layer.codes, layer.weight.clone()
    half_way(layer, weight)
    torch.testing.assert_close(layer.weight, (weight + rounded) / 2)
    start = layer.learn_rounding()
    inside = (start.floor >= 0) & (start.floor < 15)
    assert torch.equal(start.codes()[inside].to(torch.uint8), codes[inside]), "nothing learned is nothing changed"


def test_scaled_channels_stay_scaled():
    scaling = ScaleChannels(groups=2, data=networks.ALL_ROWS)
    unet, full, *_ = networks.quantized((scaling, *networks.recipe(weight_range="minmax"), SHORT), "w8a8")
    layer, weight = unet.conv_in, full.conv_in.weight
    factors = layer.input_quantizer.factors.view(1, -1, 1, 1)
    step = layer.weight_scale.view(-1, 1, 1, 1)
    assert ((layer.weight - weight * factors).abs() <= 1.01 * step).all()


def test_a_stopped_run_goes_on_where_it_was(tmp_path):
    pool, workspace = networks.pool(networks.unconditional()), FolderWorkspace(tmp_path)
    clipping = DDIMScheduler.from_config(networks.scheduler().config, clip_sample=True, clip_sample_range=0.5)
    found, kept = [], []
    for scheduler in (pool.scheduler, pool.scheduler, clipping):
        unet, given = networks.unconditional(), replace(pool, scheduler=scheduler)
        passes = (*networks.recipe(), replace(SHORT, rounds=2))
        quantize_(unet, Precision.parse("w4a4"), passes, given, networks.generator(), workspace=workspace)
        found.append(unet.state_dict())
        kept.append(len(list(tmp_path.iterdir())))
    assert kept[0] == kept[1] > 0, "the second run finds all that the first has learned"
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert kept[2] == 2 * kept[0], "on other trajectories nothing is found"


def test_what_it_needs_is_asked_for_before_anything_is_learned():
    unet = networks.unconditional()
    pool = networks.pool(unet)
    nameless = replace(pool, scheduler=None)
    with pytest.raises(ValueError, match="does not say which scheduler recorded it"):
        networks.quantized((*networks.recipe(), SHORT), recorded=nameless)
    residuals = {"mid_block_additional_residual": torch.zeros(5, 4, 1)}
    with pytest.raises(ValueError, match="recorded with a ControlNet"):
        resampled(unet, replace(pool, residuals=residuals), 4, 4, networks.generator())
    with pytest.raises(ValueError, match="no range before the pass recalibration"):
        networks.quantized((*networks.recipe()[:-1], SHORT))
    branches = LowRankBranches(2, 1, 3, data=networks.ALL_ROWS, batch=6)
    with pytest.raises(ValueError, match="has a low-rank branch, whose residual"):
        networks.quantized((branches, *networks.recipe(), SHORT))
    with pytest.raises(ValueError, match="rounds is 0"):
        Recalibration(0)
