"""Quantisation-aware training: LSQ against its formulas, the data against theirs, and a tiny network that learns."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.tfmq import networks
from tfmq.modules.layers import quantized_layer
from tfmq.network.backbone import backbone_of
from tfmq.passes.step_network import StepNetworks, sample_activations, tabulate, with_silu_grids
from tfmq.passes.training import LearnedStepWeight, TrainingConfig, noised, train
from tfmq.plan import activation_quantizers, insert_quantizers, plan_for, quantized_layers
from tfmq.precision import Precision


@pytest.mark.parametrize("bits", [4, 8])
def test_learned_step_gradients_are_those_of_lsq(bits):
    generator = networks.generator()
    weight = nn.Parameter(torch.randn(3, 2, 3, 3, generator=generator))
    part = LearnedStepWeight(weight, bits)
    with torch.no_grad():
        part.scale.mul_(0.7)  # so that some weights are clipped
    upstream = torch.randn(weight.shape, generator=generator)
    part().backward(upstream)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    for channel in range(3):
        step, total = part.scale[channel].item(), 0.0
        pairs = zip(weight[channel].flatten().tolist(), upstream[channel].flatten().tolist(), strict=True)
        passed = weight.grad[channel].flatten().tolist()
        for i, (w, g) in enumerate(pairs):
            inside = low <= round(w / step) <= high
            total += g * (round(w / step) - w / step if inside else (low if w < 0 else high))
            assert passed[i] == pytest.approx(g if inside else 0)
        expected = total / math.sqrt((2**bits - 1) * 18)
        assert part.scale.grad[channel].item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3), nn.Linear(4, 6)])
def test_folding_changes_no_weight(layer):
    twin = quantized_layer(layer, 4, 32, None)
    twin.rounding = part = LearnedStepWeight(twin.weight, 4)
    before = twin.effective_weight().detach()
    part.finish(twin)
    assert twin.rounding is None and twin.codes.dtype == torch.uint8 and twin.codes.max() <= 15
    assert torch.equal(twin.weight, before) and not twin.weight.requires_grad
    assert (twin.weight_zero_point == 8).all()


@pytest.mark.parametrize("kind", networks.KINDS)
def test_noised_samples_follow_the_schedule(kind):
    kind = networks.KINDS[kind]
    pool = kind.pool(kind.build())
    alphas = networks.scheduler().alphas_cumprod
    rows, noise = noised(pool, 50, networks.generator())
    for latents, timestep, e in zip(rows.latents, rows.timesteps, noise, strict=True):
        clean = (latents - (1 - alphas[timestep]).sqrt() * e) / alphas[timestep].sqrt()
        assert (clean - pool.samples).flatten(1).abs().amax(1).min() < 1e-3
    assert set(rows.timesteps.tolist()) == set(pool.timesteps.tolist())
    assert abs(noise.std() - 1) < 0.05


def test_one_row_in_ten_is_unconditional_where_guidance_is_used():
    pool = networks.pool(networks.unconditional())
    marked = dataclasses.replace(pool, context=torch.ones(4, 5, 12), unconditional=torch.zeros(4, 5, 12))
    rows, _ = noised(marked, 2000, networks.generator())
    assert 0.88 < rows.context.mean() < 0.92
    assert rows.context.flatten(1).std(1).max() == 0


def prepared():
    unet = networks.unconditional()
    pool = networks.pool(copy.deepcopy(unet))
    backbone = backbone_of(unet)
    plan = plan_for(unet.requires_grad_(False), backbone, Precision.parse("w4a4"))
    insert_quantizers(unet, with_silu_grids(plan, unet, backbone))
    unet.step_tracker.steps = pool.timesteps.unique()
    samples = sample_activations(unet, pool.spaced(5, 4), 16, 20, networks.generator())
    initial = samples.initial_steps(activation_quantizers(unet))
    return unet, StepNetworks(initial, unet.time_proj.num_channels, networks.generator()), pool


def trained(config):
    unet, made, pool = prepared()
    train(unet, made, unet.time_proj, pool, config, networks.generator())
    tabulate(made, activation_quantizers(unet), unet.time_proj(unet.step_tracker.steps))
    return unet, made, pool


@torch.no_grad()
def loss(unet, pool):
    rows, noise = noised(pool, 64, torch.Generator().manual_seed(7))
    return F.mse_loss(unet(rows.latents, rows.timesteps).sample, noise).item()


def test_training_lowers_the_diffusion_loss_and_leaves_a_plain_quantised_network():
    short, long = (TrainingConfig(iterations, 16, 2e-2, 3e-3) for iterations in (1, 40))
    (before, start, pool), (after, made, _) = trained(short), trained(long)
    assert loss(after, pool) < 0.9 * loss(before, pool)
    for old, new in zip(start.parameters(), made.parameters(), strict=True):
        assert not torch.equal(old, new)
    for path, layer in quantized_layers(after).items():
        assert layer.rounding is None and layer.codes is not None, path
        levels = (layer.codes - layer.spread(layer.weight_zero_point)) * layer.spread(layer.weight_scale)
        assert torch.equal(layer.weight, levels), path
    assert not torch.equal(before.conv_norm_out.weight, after.conv_norm_out.weight)
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in after.parameters())
    assert not any(quantizer.scale.requires_grad for quantizer in activation_quantizers(after).values())


def test_the_same_generator_trains_the_same_network():
    config = TrainingConfig(3, 4, 1e-3, 1e-3)
    first, second = (trained(config)[0].state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_diverging_training_stops():
    unet, made, pool = prepared()
    with pytest.raises(ValueError, match="lower the learning rate"):
        train(unet, made, unet.time_proj, pool, TrainingConfig(50, 4, 1e30, 1e30, warmup=0.0), networks.generator())
