"""Learning by the signs of gradients: against a plain implementation, and what is kept of it."""

from __future__ import annotations

import pytest
import torch

from tests.tfmq import networks
from tfmq.modules.fake_quantize import StepTracker
from tfmq.modules.layers import quantized_layer
from tfmq.passes.reconstruction import random_batches, reconstruction_loss
from tfmq.passes.signed_rounding import SignedRounding, SignedRoundingConfig, learn_signed_roundings
from tfmq.passes.weight_ranges import RoundToNearest, WeightRanges
from tfmq.precision import Precision
from tfmq.quantization import quantize_
from tfmq.workspace import FolderWorkspace


def straight(x):
    return x + (torch.round(x) - x).detach()


def small_layer(bits=3):
    """A linear layer in float64, its inputs and targets."""
    torch.manual_seed(0)
    layer = quantized_layer(torch.nn.Linear(6, 4).double().requires_grad_(False), bits, 32, StepTracker())
    x = torch.randn(32, 6, dtype=torch.float64)
    return layer, x, layer(x)


def plainly(weight, bias, x, target, batches, config):
    """The published algorithm, written down without a thought for speed; weight, and loss of every step."""
    last = 7
    offset = torch.zeros_like(weight, requires_grad=True)
    alpha, beta = (torch.ones(len(weight), 1, dtype=weight.dtype, requires_grad=True) for _ in range(2))
    low, high = weight.amin(1, keepdim=True).clamp_max(0), weight.amax(1, keepdim=True).clamp_min(0)
    losses, found = [], []
    for step, rows in enumerate(batches):
        scale = (alpha * high - beta * low) / last
        zero_point = straight(-beta * low / scale)
        codes = straight(weight / scale + offset) + zero_point
        # Clipping passes the gradient of a code at the end of the grid, as long as it is not beyond.
        clipped = torch.where(codes < -0.5, 0.0, torch.where(codes > last + 0.5, float(last), codes))
        rounded = scale * (clipped - zero_point)
        loss = ((x[rows] @ rounded.T + bias - target[rows]) ** 2).sum(1).mean()
        losses.append(loss.item())
        found.append(rounded.detach())
        gradients = torch.autograd.grad(loss, (offset, alpha, beta))
        rate = (1 / config.iterations) * (1 - step / config.iterations)
        with torch.no_grad():
            for part, gradient, bounds in zip(
                (offset, alpha, beta), gradients, ((-0.5, 0.5), (0, 1), (0, 1)), strict=True
            ):
                part -= rate * gradient.sign()
                part.clamp_(*bounds)
    return found[min(range(len(losses)), key=losses.__getitem__)], losses


def test_follows_the_published_algorithm_in_float64():
    layer, x, target = small_layer()
    config = SignedRoundingConfig(iterations=40, batch=8)
    batches = list(random_batches(32, 8, 40, torch.Generator().manual_seed(0)))
    expected, losses = plainly(layer.weight.clone(), layer.bias, x, target, batches, config)
    trace = learn_signed_roundings(
        [layer], lambda rows: reconstruction_loss(layer(x[rows]), target[rows], 2.0), iter(batches), config
    )
    assert trace == pytest.approx(losses, rel=1e-9)
    torch.testing.assert_close(layer.weight.data, expected)
    assert layer.codes.dtype == torch.uint8 and layer.rounding is None and layer.consistent


def test_keeps_the_best_step_on_one_batch():
    layer, x, target = small_layer()
    trace = learn_signed_roundings(
        [layer],
        lambda rows: reconstruction_loss(layer(x[rows]), target[rows], 2.0),
        iter([torch.arange(32)] * 60),
        SignedRoundingConfig(iterations=60, batch=32),
    )
    assert min(trace) < trace[0]
    assert reconstruction_loss(layer(x), target, 2.0).item() == pytest.approx(min(trace), rel=1e-9)


def test_rates_fall_from_one_over_the_iterations_to_nothing():
    config = SignedRoundingConfig(iterations=4)
    assert [config.rate(step) for step in range(4)] == [0.25, 0.1875, 0.125, 0.0625]
    assert SignedRoundingConfig(iterations=4, learning_rate=0.02).rate(2) == 0.01
    with pytest.raises(ValueError, match="learning_rate is 0"):
        SignedRoundingConfig(learning_rate=0)


@torch.no_grad()
def test_brings_the_output_of_a_network_closer_to_full_precision():
    learning = SignedRounding(SignedRoundingConfig(iterations=60, batch=8), networks.ALL_ROWS)
    learned, full, pool, _ = networks.quantized((learning,), "w4a32")
    nearest = networks.quantized((WeightRanges("minmax"), RoundToNearest()), "w4a32")[0]
    rows = pool.spaced(5, 4)
    target = full(rows.latents, rows.timesteps).sample
    before, after = ((unet(rows.latents, rows.timesteps).sample - target).norm() for unet in (nearest, learned))
    assert after < before


def test_what_was_learned_is_taken_from_a_workspace(monkeypatch, tmp_path):
    learning = SignedRounding(SignedRoundingConfig(iterations=3, batch=8), networks.ALL_ROWS)
    found = []
    for _ in range(2):
        unet, generator = networks.unconditional(), networks.generator()
        report = quantize_(
            unet,
            Precision.parse("w4a32"),
            (learning,),
            networks.pool(networks.unconditional()),
            generator,
            workspace=FolderWorkspace(tmp_path),
        )
        found.append((unet.state_dict(), generator.get_state(), report.cost))
        monkeypatch.setattr("tfmq.passes.signed_rounding.learn_signed_roundings", None)
    (first, *spent), (second, *again) = found
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(spent[0], again[0]) and spent[1] == again[1]
