"""Networks that predict step sizes: against single torch networks, brute-force searches and a UNet's structure."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.embeddings import Timesteps
from torch import nn

from tests.tfmq import networks
from tfmq.modules.fake_quantize import FakeQuantize, StepTracker
from tfmq.network.backbone import backbone_of
from tfmq.passes.step_network import (
    ActivationSamples,
    FitConfig,
    StepNetworks,
    fit_networks,
    inverse_softplus,
    sample_activations,
    tabulate,
    with_silu_grids,
)
from tfmq.plan import activation_quantizers, insert_quantizers, plan_for
from tfmq.precision import Precision

ENCODE = Timesteps(16, True, 0)
STEPS = torch.tensor([1, 201, 401, 601, 801])


def prepared(build=networks.unconditional, precision="w4a8"):
    unet = build().requires_grad_(False)
    backbone = backbone_of(unet)
    insert_quantizers(unet, with_silu_grids(plan_for(unet, backbone, Precision.parse(precision)), unet, backbone))
    unet.step_tracker.steps = STEPS
    return unet


def scattered(count=3):
    made = StepNetworks(torch.full((count,), 0.1), 16, networks.generator())
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3, generator=networks.generator())
    return made.requires_grad_(False)


def test_batched_networks_equal_one_torch_network_each():
    made, encodings = scattered(), ENCODE(STEPS)
    for i, outputs in enumerate(made(encodings)):
        single = nn.Sequential(
            nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)
        ).append(nn.Softplus())
        for layer, weight, bias in zip(single[:-1:2], made.weights, made.biases, strict=True):
            layer.weight.data, layer.bias.data = weight[i].T, bias[i, 0]
        torch.testing.assert_close(outputs, single(encodings)[:, 0].detach())


def test_networks_start_at_the_static_step_at_every_time_step():
    initial = torch.tensor([1e-4, 0.03, 2.0, 40.0])
    made = StepNetworks(initial, 16, networks.generator())
    torch.testing.assert_close(made(ENCODE(STEPS)).detach(), initial[:, None].expand(-1, 5), rtol=1e-3, atol=0)
    torch.testing.assert_close(nn.functional.softplus(inverse_softplus(initial)), initial)


@pytest.mark.parametrize("build", [networks.unconditional, networks.conditional])
@torch.no_grad()
def test_layers_after_a_silu_are_those_that_receive_its_output(build):
    unet = build()
    outputs, found = [], set()
    layers = {p: m for p, m in unet.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    for module in unet.modules():
        if isinstance(module, nn.SiLU):
            module.register_forward_hook(lambda module, args, output: outputs.append(output))
    for path, module in layers.items():

        def receive(module, args, path=path):
            if any(args[0].data_ptr() == output.data_ptr() for output in outputs):
                found.add(path)

        module.register_forward_pre_hook(receive)
    context = () if build is networks.unconditional else (torch.randn(2, 5, 12, generator=networks.generator()),)
    unet(networks.noise(2), 401, *context)
    assert backbone_of(unet).silu_inputs(unet) == found
    assert {"conv_out", "time_embedding.linear_2", "mid_block.resnets.0.time_emb_proj"} < found


def test_grids_and_zero_points_follow_what_the_input_is():
    unet = prepared()
    quantizers = activation_quantizers(unet)
    generator = torch.Generator().manual_seed(3)
    steps = torch.rand(len(quantizers), generator=generator) * 0.05
    made = StepNetworks(steps, unet.time_proj.num_channels, generator)
    nn.init.normal_(made.weights[-1], std=0.05, generator=generator)
    encodings = unet.time_proj(STEPS)
    tabulate(made, quantizers, encodings)
    silu = backbone_of(unet).silu_inputs(unet)
    for (path, quantizer), expected in zip(quantizers.items(), made(encodings).detach(), strict=True):
        assert torch.equal(quantizer.scale, expected) and len(quantizer.scale) == len(STEPS) and quantizer.enabled
        if path.rpartition(".")[0] in silu:
            assert quantizer.grid.qmin == 0
            assert torch.equal(quantizer.zero_point, torch.round(0.2785 / expected))
        else:
            assert (quantizer.grid.qmin == 0) == path.endswith("probabilities")
            assert not quantizer.zero_point.any()
    assert any(q.scale.std() > 0 for q in quantizers.values())


def gaussian_samples(deviations, values=256, rows=40):
    """Rows at five time steps; two inputs whose deviation depends on the step, and the SiLU of the first."""
    generator = torch.Generator().manual_seed(1)
    step = torch.arange(5).repeat(rows)
    x = torch.randn(len(step), 2, values, generator=generator) * deviations[:, step].T[..., None]
    return ActivationSamples(torch.cat([x, nn.functional.silu(x[:, :1])], 1), STEPS[step]), step


def error(x, scale, lower, grid):
    """Mean squared error, written without the library."""
    point = (lower / scale).round()
    return ((((x / scale).round() + point).clamp(*grid) - point) * scale - x).square().mean().item()


@pytest.mark.parametrize("bits", [4, 6])
def test_fitting_finds_the_best_step_at_every_time_step(bits):
    deviations = torch.tensor([[0.5, 1.0, 2.0, 3.0, 4.0], [1.0, 0.8, 0.6, 0.4, 0.2]])
    samples, step = gaussian_samples(deviations)
    tracker = StepTracker()
    quantizers = {name: FakeQuantize(bits, tracker, symmetric=True) for name in "ab"}
    quantizers["silu"] = FakeQuantize(bits, tracker)
    made = StepNetworks(samples.initial_steps(quantizers), 16, networks.generator())
    start = made(ENCODE(STEPS)).detach()
    trace = fit_networks(made, quantizers, samples, ENCODE, FitConfig(400, 64, 3e-3), networks.generator())
    scales = made(ENCODE(STEPS)).detach()
    assert sum(trace[-20:]) < sum(trace[:20])
    for q, quantizer in enumerate(quantizers.values()):
        lower = 0.0 if quantizer.symmetric else 0.2785
        learned, static, best = 0.0, 0.0, 0.0
        for s in range(5):
            x = samples.values[step == s, q]
            candidates = torch.linspace(0.01, 1.5, 150) * x.abs().max() / 2 ** (bits - 1)
            errors = [error(x, c, lower, quantizer.grid) for c in candidates]
            learned += error(x, scales[q, s], lower, quantizer.grid)
            static += error(x, start[q, s], lower, quantizer.grid)
            best += min(errors)
            if quantizer.symmetric:
                best_scale = candidates[errors.index(min(errors))]
                assert abs(scales[q, s] / best_scale - 1) < 0.15, (q, s, scales[q, s], best_scale)
        assert learned < 1.1 * best and learned < 0.8 * static, (q, learned, best, static)


def test_static_steps_are_the_released_statistics():
    samples, _ = gaussian_samples(torch.ones(2, 5))
    tracker = StepTracker()
    quantizers = {
        "signed": FakeQuantize(4, tracker, symmetric=True),
        "probabilities": FakeQuantize(4, tracker, positive=True),
        "silu": FakeQuantize(8, tracker),
    }
    steps = samples.initial_steps(quantizers)
    x = samples.values.double().numpy()
    assert steps[0].item() == pytest.approx((abs(x[:, 0].mean()) + 3 * x[:, 0].std()) / (15 / 2 - 1), rel=1e-4)
    assert steps[1].item() == pytest.approx(1 / 14)
    assert steps[2].item() == pytest.approx((x[:, 2].mean() + 16 * x[:, 2].std()) / 254, rel=1e-4)


def test_samples_are_entries_of_the_unquantised_inputs_and_repeat():
    unet, rows = prepared(), networks.pool(networks.unconditional()).spaced(5, 2)
    first, second = (sample_activations(unet, rows, 7, 3, networks.generator()) for _ in range(2))
    assert torch.equal(first.values, second.values)
    assert first.values.shape == (10, len(activation_quantizers(unet)), 7)
    assert torch.equal(first.timesteps, rows.timesteps)
    position = list(activation_quantizers(unet)).index("conv_in.input_quantizer")
    for row, drawn in zip(rows.latents, first.values[:, position], strict=True):
        assert torch.isin(drawn, row).all()
    assert not any(quantizer._forward_pre_hooks for quantizer in activation_quantizers(unet).values())


def test_inputs_that_cannot_be_quantised_are_named():
    rows = networks.pool(networks.unconditional()).spaced(5, 2)
    broken = copy.deepcopy(rows)
    broken.latents[3, 0, 0, 0] = torch.nan
    unet = prepared()
    with pytest.raises(ValueError, match="conv_in.input_quantizer holds NaN or infinity at time step"):
        sample_activations(unet, broken, 200, 10, networks.generator())
    with torch.no_grad():
        unet.mid_block.resnets[0].norm2.weight.zero_()
        unet.mid_block.resnets[0].norm2.bias.fill_(1.0)
    samples = sample_activations(unet, rows, 7, 10, networks.generator())
    with pytest.raises(ValueError, match="mid_block.resnets.0.conv2.input_quantizer is constant"):
        samples.initial_steps(activation_quantizers(unet))
