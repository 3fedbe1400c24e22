"""Low-rank branches against numpy's singular value decomposition, and smoothing against the layer itself."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from tests.tfmq import networks
from tfmq.modules.fake_quantize import StepTracker
from tfmq.modules.layers import quantized_layer
from tfmq.network.backbone import backbone_of
from tfmq.passes.grids import Grids
from tfmq.passes.low_rank import LowRankBranches, add_branches, has_branch, smoothing_factors, split_weight, truncate
from tfmq.plan import insert_quantizers, quantized_layers

LAYERS = {
    "linear": (lambda: nn.Linear(12, 10), (5, 7, 12)),
    "conv": (lambda: nn.Conv2d(6, 10, 3, stride=2, padding=1), (5, 6, 8, 8)),
    "pointwise": (lambda: nn.Conv2d(12, 10, 1, bias=False), (5, 12, 4, 4)),
}


def layer_and_input(name):
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    return build().requires_grad_(False), torch.randn(shape)


def branched(layer, rank, smoothing=None, weight_bits=4, activation_bits=32):
    twin = quantized_layer(layer, weight_bits, activation_bits, StepTracker(), dynamic=True, rank=rank)
    split_weight(twin, layer.weight, torch.ones(layer.weight.shape[1]) if smoothing is None else smoothing)
    return twin


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (9, 9)])
@pytest.mark.parametrize("rank", [1, 4, 8])
def test_the_truncation_leaves_what_eckart_and_young_say(shape, rank):
    matrix = torch.randn(shape, generator=networks.generator(), dtype=torch.float64)
    left, right = truncate(matrix, rank)
    assert left.shape == (shape[0], rank) and right.shape == (rank, shape[1])
    u, values, v = np.linalg.svd(matrix.numpy(), full_matrices=False)
    np.testing.assert_allclose((left @ right).numpy(), (u[:, :rank] * values[:rank]) @ v[:rank], atol=1e-10)
    residual = np.linalg.norm((matrix - left @ right).numpy())
    np.testing.assert_allclose(residual, np.sqrt((values[rank:] ** 2).sum()), rtol=1e-10)
    # Both factors carry the square root of the singular values.
    np.testing.assert_allclose(left.norm(dim=0).square().numpy()[::-1], values[:rank], rtol=1e-8)
    np.testing.assert_allclose(right.norm(dim=1).square().numpy()[::-1], values[:rank], rtol=1e-8)


def test_a_matrix_of_lower_rank_has_factors_that_fit_16_bits():
    left, right = truncate(torch.zeros(5, 8), 3)
    assert torch.equal(left @ right, torch.zeros(5, 8, dtype=torch.float64))
    for seed in range(130, 150):  # in one of these an eigenvalue of 0 comes out negative
        generator = torch.Generator().manual_seed(seed)
        column = torch.randn(12, 2, generator=generator) @ torch.randn(2, 30, generator=generator)[:, :1]
        matrix = column.expand(-1, 30)
        left, right = (factor.half().double() for factor in truncate(matrix, 6))
        torch.testing.assert_close(left @ right, matrix.double(), rtol=0, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
def test_a_branch_of_full_rank_is_the_layer_up_to_sixteen_bits(name):
    layer, x = layer_and_input(name)
    twin = branched(layer, 10)
    assert twin.weight.abs().max() < 2e-3 * layer.weight.abs().max()
    twin.weight = nn.Parameter(torch.zeros_like(twin.weight), requires_grad=False)
    assert relative(twin(x), layer(x)) < 1e-3


@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
def test_branch_and_smoothing_change_nothing_in_full_precision(name):
    layer, x = layer_and_input(name)
    factors = torch.rand(layer.weight.shape[1], generator=networks.generator()) * 10 + 0.1
    assert relative(branched(layer, 3, factors)(x), layer(x)) < 1e-6


@torch.no_grad()
def test_the_residual_is_that_of_the_smoothed_kernel_as_a_matrix():
    layer, _ = layer_and_input("conv")
    factors = torch.rand(6, generator=networks.generator()) + 0.5
    twin = branched(layer, 4, factors)
    values = np.linalg.svd((layer.weight * factors.view(1, -1, 1, 1)).flatten(1).numpy(), compute_uv=False)
    np.testing.assert_allclose(twin.weight.norm(), np.sqrt((values[4:] ** 2).sum()), rtol=1e-4)
    assert twin.down.shape == (4, 6, 3, 3) and twin.up.shape == (10, 4, 1, 1)
    assert twin.down.dtype == twin.up.dtype == torch.float16


@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
def test_a_branch_lowers_the_error_of_the_quantised_weight(name):
    layer, x = layer_and_input(name)
    errors = []
    for rank in (0, 2, 6):
        twin = branched(layer, rank, weight_bits=3) if rank else quantized_layer(layer, 3, 32, StepTracker())
        twin.find_weight_range("minmax")
        twin.fold()
        errors.append(relative(twin(x), layer(x)))
    assert errors[2] < errors[1] < errors[0]


@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
def test_smoothing_takes_the_harm_from_outliers_in_one_channel(name):
    layer, x = layer_and_input(name)
    channel = x.movedim(-1, 1) if name == "linear" else x
    channel[:, 2] *= 50
    layer.weight[:, 2] /= 50
    errors = {}
    for strength in (None, 0.5):
        largest = channel.transpose(0, 1).flatten(1).abs().amax(1)
        weight_largest = layer.weight.transpose(0, 1).flatten(1).abs().amax(1)
        factors = None if strength is None else smoothing_factors(largest, weight_largest, strength)
        twin = branched(layer, 2, factors, weight_bits=8, activation_bits=4)
        twin.find_weight_range("minmax")
        twin.fold()
        errors[strength] = relative(twin(x), layer(x))
    assert errors[0.5] < 0.3 * errors[None]


def test_smoothing_factors_are_smoothquants():
    largest, weight = torch.tensor([4.0, 9.0, 0.0, 2.0]), torch.tensor([1.0, 4.0, 3.0, 0.0])
    torch.testing.assert_close(smoothing_factors(largest, weight, 0.5), torch.tensor([2.0, 1.5, 1.0, 1.0]))
    torch.testing.assert_close(smoothing_factors(largest, weight, 1.0), torch.tensor([4.0, 9.0, 1.0, 1.0]))
    torch.testing.assert_close(smoothing_factors(largest, weight, 0.0), torch.tensor([1.0, 0.25, 1.0, 1.0]))


def test_only_layers_larger_than_the_rank_have_a_branch():
    assert has_branch(nn.Linear(12, 10), 9) and not has_branch(nn.Linear(12, 10), 10)
    assert has_branch(nn.Conv2d(1, 10, 3), 8) and not has_branch(nn.Conv2d(1, 10, 3), 9)
    assert not has_branch(nn.Conv2d(8, 8, 3, groups=8), 2) and not has_branch(nn.Linear(12, 10), 0)


def inserted(config):
    full = networks.unconditional()
    unet = copy.deepcopy(full).requires_grad_(False)
    insert_quantizers(unet, networks.plan(unet, "w4a4", Grids(dynamic_activations=True), config))
    layers = {path: layer for path, layer in quantized_layers(unet).items() if layer.rank}
    rows = networks.pool(full).spaced(5, 4)
    return unet, full, layers, rows, add_branches(full, layers, rows, config)


@torch.no_grad()
def test_the_search_takes_the_strength_of_the_smallest_output_error():
    config = LowRankBranches(rank=4, candidates=3, search_rows=20, batch=6)
    _, full, layers, rows, chosen = inserted(config)
    assert set(chosen) == set(layers) and set(chosen.values()) <= {None, 0.0, 0.5, 1.0}
    assert len(set(chosen.values())) > 1
    path = "mid_block.resnets.0.conv1"
    original, seen = full.get_submodule(path), {}
    handle = original.register_forward_hook(lambda m, args, output: seen.update(x=args[0], output=output))
    full(rows.latents, rows.timesteps)
    handle.remove()
    largest = seen["x"].abs().amax((0, 2, 3))
    weight_largest = original.weight.abs().amax((0, 2, 3))
    errors = {}
    for strength in (None, 0.0, 0.5, 1.0):
        factors = None if strength is None else smoothing_factors(largest, weight_largest, strength)
        twin = branched(original, 4, factors, activation_bits=4)
        twin.find_weight_range("minmax")
        twin.fold()
        errors[strength] = (twin(seen["x"]) - seen["output"]).square().mean().item()
        if strength == chosen[path]:
            torch.testing.assert_close(layers[path].smoothing, twin.smoothing)
    assert min(errors, key=errors.get) == chosen[path]


@torch.no_grad()
def test_branches_leave_the_network_as_it_was_until_it_is_folded():
    unet, full, layers, rows, _ = inserted(LowRankBranches(rank=4, candidates=1, search_rows=3, batch=6))
    assert all(layer.codes is None for layer in layers.values())
    for layer in quantized_layers(unet).values():
        layer.input_quantizer = nn.Identity()
    for path in backbone_of(full).attentions:
        attention = unet.get_submodule(path)
        del attention.processor
        attention.processor = full.get_submodule(path).processor
    expected = full(rows.latents, rows.timesteps).sample
    torch.testing.assert_close(unet(rows.latents, rows.timesteps).sample, expected, rtol=1e-3, atol=1e-4)


def test_activations_that_are_not_finite_are_named():
    full = networks.unconditional()
    rows = networks.pool(full).spaced(5, 4)
    with torch.no_grad():
        full.conv_in.bias[0] = float("nan")
    layer = quantized_layer(full.mid_block.resnets[0].conv1, 4, 8, StepTracker(), dynamic=True, rank=2)
    with pytest.raises(ValueError, match=r"mid_block\.resnets\.0\.conv1 holds NaN or infinity"):
        add_branches(full, {"mid_block.resnets.0.conv1": layer}, rows, LowRankBranches(2, 1, 4, batch=20))
