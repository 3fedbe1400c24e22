"""Ranges at run time, against torch's own fake-quantise applied slice by slice; group-wise weights likewise."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.tfmq import networks
from tfmq.modules.dynamic import DynamicQuantize
from tfmq.modules.fake_quantize import StepTracker
from tfmq.modules.layers import quantized_layer
from tfmq.passes.grids import Grids, group_sizes
from tfmq.plan import LayerPlan, QuantizationPlan, insert_quantizers


def reference(row: torch.Tensor, bits: int, symmetric: bool = False, positive: bool = False) -> torch.Tensor:
    """One slice quantised by itself."""
    low = 0.0 if positive else min(row.min().item(), 0.0)
    high = max(row.max().item(), 0.0)
    if symmetric:
        scale, point, ends = 2 * max(-low, high) / (2**bits - 2), 0, (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    else:
        scale = (high - low) / (2**bits - 1)
        point, ends = round(-low / scale), (0, 2**bits - 1)
    return torch.fake_quantize_per_tensor_affine(row, scale, point, *ends)


def assert_same_grid(found, expected):
    """Equal but for rounding ties, which torch's kernel may take to the other side: at most one code in a thousand."""
    differing = (found - expected).abs() > 1e-5 * expected.abs().max()
    assert differing.float().mean() <= 1e-3


SLICES = {
    "token": (-1, lambda x: x.flatten(0, -2)),
    "pixel": (1, lambda x: x.movedim(1, -1).flatten(0, -2)),
    "image": (None, lambda x: x.flatten(1)),
}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("name", SLICES)
def test_each_slice_is_quantised_by_itself(name, symmetric, bits):
    dim, slices = SLICES[name]
    x = torch.randn(3, 6, 4, 5, generator=networks.generator()) * torch.tensor([1.0, 10.0, 0.1]).view(3, 1, 1, 1) + 0.3
    found = DynamicQuantize(bits, dim, symmetric)(x)
    assert found.shape == x.shape
    for row, expected in zip(slices(found), slices(x), strict=True):
        assert_same_grid(row, reference(expected, bits, symmetric))


def test_probabilities_start_at_zero():
    x = torch.rand(2, 3, 4, 7, generator=networks.generator()).softmax(-1)
    found = DynamicQuantize(4, -1, positive=True)(x)
    for row, expected in zip(found.flatten(0, 2), x.flatten(0, 2), strict=True):
        assert_same_grid(row, reference(expected, 4, positive=True))
    torch.testing.assert_close(found.amax(-1), x.amax(-1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("positive", [False, True])
def test_a_slice_that_is_not_finite_stays_so_and_leaves_the_others(bad, positive):
    x = torch.rand(4, 8, generator=networks.generator())
    good = DynamicQuantize(8, positive=positive)(x)
    x[1, 3] = bad
    found = DynamicQuantize(8, positive=positive)(x)
    assert not torch.isfinite(found[1, 3])
    assert torch.equal(found[[0, 2, 3]], good[[0, 2, 3]])


def test_zeros_stay_zeros():
    assert torch.equal(DynamicQuantize(4)(torch.zeros(2, 5)), torch.zeros(2, 5))


LAYERS = {
    "linear": (lambda: nn.Linear(10, 4), (3, 7, 10), -1),
    "pointwise": (lambda: nn.Conv2d(10, 4, 1), (3, 10, 4, 4), 1),
    "conv": (lambda: nn.Conv2d(10, 4, 3, padding=1), (3, 10, 4, 4), None),
}


@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
def test_a_group_wise_layer_is_torch_quantising_each_group_and_token_by_itself(name):
    torch.manual_seed(0)
    build, shape, dim = LAYERS[name]
    layer, x = build(), torch.randn(shape)
    twin = quantized_layer(layer, 4, 8, StepTracker(), group_sizes(10, 4), dynamic=True)
    twin.find_weight_range("minmax")
    twin.fold()
    parts = []
    for start in (0, 4, 8):  # groups of 4, 4 and the last 2 channels
        part = layer.weight[:, start : start + 4]
        low, high = part.flatten(1).amin(1).clamp_max(0), part.flatten(1).amax(1).clamp_min(0)
        scale = (high - low) / 15
        point = torch.round(-low / scale).to(torch.int32)
        parts.append(torch.fake_quantize_per_channel_affine(part, scale, point, 0, 0, 15))
    weight = torch.cat(parts, 1)
    torch.testing.assert_close(twin.weight, weight)
    layer.weight.data = weight
    moved = x.flatten(1) if dim is None else x.movedim(dim, -1).flatten(0, -2)
    rows = torch.stack([reference(row, 8) for row in moved])
    rows = rows.view(shape) if dim is None else rows.view(x.movedim(dim, -1).shape).movedim(-1, dim)
    torch.testing.assert_close(twin(x), layer(rows), rtol=1e-3, atol=1e-3)
    assert twin.weight_scale.shape == (4, 3)


@torch.no_grad()
@pytest.mark.parametrize("build", [networks.unconditional, networks.conditional])
def test_attention_ranges_are_those_of_a_token_and_head(build):
    unet, full = build(), build()
    plan = networks.plan(unet, "w4a8", Grids(dynamic_activations=True))
    insert_quantizers(unet, QuantizationPlan({}, plan.attentions))
    path, _ = max(plan.attentions.items())
    attention, original = unet.get_submodule(path), full.get_submodule(path)
    assert attention.heads > 1
    seen = {}
    for part in ("query", "key", "value", "probabilities"):
        quantizer = getattr(attention.processor, part)
        quantizer.register_forward_hook(lambda m, args, output, part=part: seen.update({part: (args[0], output)}))
    width = original.to_q.in_features
    tokens = torch.randn(2, 16, width, generator=networks.generator())
    context = torch.randn(2, 5, original.to_k.in_features) if original.to_k.in_features != width else None
    output = attention(tokens, context)
    for part, (before, after) in seen.items():
        heads = original.heads if part != "probabilities" else before.shape[1]
        assert heads == original.heads
        for row, expected in zip(after.flatten(0, -2), before.flatten(0, -2), strict=True):
            assert_same_grid(row, reference(expected, 8, positive=part == "probabilities"))
        assert before.shape[-1] == (width // heads if part != "probabilities" else seen["key"][0].shape[1])
    expected = original(tokens, context)
    assert 0 < (output - expected).norm() < 0.05 * expected.norm()


def test_a_layer_plan_of_dynamic_ranges_has_no_calibrated_quantisers():
    unet = networks.unconditional()
    plan = QuantizationPlan({"conv_in": LayerPlan(4, 8, (2, 1), dynamic=True)}, {})
    insert_quantizers(unet, plan)
    assert isinstance(unet.conv_in.input_quantizer, DynamicQuantize)
