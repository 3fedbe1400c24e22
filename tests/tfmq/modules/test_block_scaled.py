"""Layers and inputs in block formats, against a slow quantiser of one block at a time."""

from __future__ import annotations

import copy
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

from tests.tfmq import networks
from tfmq.checkpoint import load_quantized, save_quantized
from tfmq.modules.block_scaled import BlockConv2d, BlockQuantize, BlockScaledLayer, block_layer
from tfmq.modules.fake_quantize import StepTracker
from tfmq.network.backbone import evaluate
from tfmq.packing import packed_bytes
from tfmq.passes.block_formats import BlockFormats
from tfmq.passes.noise_distillation import NoiseDistillation
from tfmq.passes.rectification import Rectification
from tfmq.passes.weight_ranges import RoundToNearest, WeightRanges
from tfmq.plan import LayerPlan, quantized_layers
from tfmq.state import plan_of

FORMATS = [(8, 32, "e8m0"), (4, 16, "e4m3"), (4, 5, "e4m3"), (6, 3, "e8m0")]
RECIPE = (BlockFormats(block=16, wide_block=32), WeightRanges("minmax"), RoundToNearest())
TUNED = (Rectification(2, 4, data=networks.ALL_ROWS), *RECIPE)


def quantized_block(block: np.ndarray, bits: int, scales: str, coarse: float, unsigned: bool = False) -> np.ndarray:
    """One block by itself: scale by numpy and ml_dtypes, then the nearest of all values that codes can have."""
    last = 2**bits - 1 if unsigned else 2 ** (bits - 1) - 1
    largest = np.abs(block).max()
    if largest == 0:
        return block
    if scales == "e8m0":
        scale = 2.0 ** np.floor(np.log2(largest)) / 2 ** (bits - 2)
    else:
        scale = np.float32(largest / last / coarse).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
        scale = max(scale, 2.0**-9) * coarse
    values = np.arange(0 if unsigned else -last, last + 1) * scale
    return values[np.abs(block[:, None] - values[None]).argmin(1)]


def coarse_of(x: np.ndarray, bits: int, unsigned: bool = False) -> float:
    return np.abs(x).max() / (2**bits - 1 if unsigned else 2 ** (bits - 1) - 1) / 448


def slowly(x: torch.Tensor, bits: int, block: int, scales: str, unsigned: bool = False) -> torch.Tensor:
    """An input (N, C, ...) block by block."""
    images = []
    for image in x.double().numpy():
        rows = image.reshape(len(image), -1)
        coarse, found = coarse_of(image, bits, unsigned), np.empty_like(rows)
        for pixel in range(rows.shape[1]):
            for start in range(0, len(rows), block):
                part = slice(start, start + block)
                found[part, pixel] = quantized_block(rows[part, pixel], bits, scales, coarse, unsigned)
        images.append(found.reshape(image.shape))
    return torch.tensor(np.stack(images))


def assert_same_values(found, expected):
    """Equal but for ties, which a sum of float64 may break to the other side: at most one value in two hundred."""
    differing = (found.double() - expected).abs() > 1e-5 * expected.abs().max()
    assert differing.double().mean() <= 5e-3


# Powers of two go with signed codes alone.
INPUTS = [(*each, unsigned) for each in FORMATS for unsigned in (False, True) if not (unsigned and each[2] == "e8m0")]


@pytest.mark.parametrize(("bits", "block", "scales", "unsigned"), INPUTS)
def test_each_block_of_an_input_is_quantised_by_itself(bits, block, scales, unsigned):
    x = torch.randn(2, 21, 3, 2, generator=networks.generator()) * torch.tensor([1.0, 50.0]).view(2, 1, 1, 1)
    x = x.relu() if unsigned else x
    found = BlockQuantize(bits, 1, block, scales, unsigned)(x)
    assert found.shape == x.shape and found.dtype == torch.float32
    assert_same_values(found, slowly(x, bits, block, scales, unsigned))
    tokens = x.flatten(2).transpose(1, 2)
    assert torch.equal(BlockQuantize(bits, -1, block, scales, unsigned)(tokens), found.flatten(2).transpose(1, 2))


def test_images_of_a_batch_do_not_meet():
    quantize, x = BlockQuantize(4, 1, 16, "e4m3"), torch.randn(3, 20, 2, 2, generator=networks.generator())
    x[1] *= 1000
    assert torch.equal(quantize(x), torch.cat([quantize(image[None]) for image in x]))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_is_quantised_in_float32(kind):
    quantize, x = BlockQuantize(4, 1, 16, "e4m3"), torch.randn(2, 20, 2, 2, generator=networks.generator()).to(kind)
    assert quantize(x).dtype == kind and torch.equal(quantize(x), quantize(x.float()).to(kind))


def test_zeros_stay_and_gradients_pass():
    x = torch.randn(2, 20, 2, 2, generator=networks.generator())
    x[0, :16], x[1] = 0, 0
    x.requires_grad_()
    for quantize in (BlockQuantize(4, 1, 16, "e4m3"), BlockQuantize(8, 1, 32, "e8m0")):
        found = quantize(x)
        assert torch.isfinite(found).all() and (found[x == 0] == 0).all()
        found.sum().backward()
        assert (x.grad == 1).float().mean() > 0.9
        x.grad = None


@pytest.mark.parametrize(("bits", "block", "scales"), FORMATS)
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_each_block_of_a_weight_is_quantised_by_itself(kind, bits, block, scales):
    torch.manual_seed(0)
    given = nn.Conv2d(21, 4, (3, 2)) if kind == "conv" else nn.Linear(21, 4)
    weight = given.weight.detach().clone()
    layer = block_layer(given, bits, bits, StepTracker(), block, scales, unsigned=False)
    layer.find_weight_range("minmax")
    layer.fold()
    expected = torch.stack([slowly(row[None], bits, block, scales)[0] for row in weight])
    assert_same_values(layer.weight, expected)
    assert layer.consistent and layer.codes.min() >= 1 and layer.codes.max() <= 2**bits - 1
    assert layer.scale_codes.shape == (4, -(-21 // block), *weight.shape[2:])


def test_scales_cannot_be_set_or_searched():
    layer = block_layer(nn.Linear(4, 4), 4, 4, StepTracker(), 2, "e4m3", unsigned=False)
    with pytest.raises(ValueError, match="take minmax, not search"):
        layer.find_weight_range("search")
    with pytest.raises(ValueError, match="cannot be set"):
        layer.weight_scale = torch.ones(4, 2)
    with pytest.raises(ValueError, match="no other zero point"):
        layer.weight_zero_point = torch.ones(4, 2)
    with pytest.raises(ValueError, match="choose e8m0 or e4m3"):
        block_layer(nn.Linear(4, 4), 4, 4, StepTracker(), 2, "float32", unsigned=False)
    with pytest.raises(ValueError, match="no splits"):
        LayerPlan(4, 4, splits=(2, 2), block=2)
    with pytest.raises(ValueError, match="cannot be set"):
        networks.quantized((*RECIPE, NoiseDistillation(1, data=networks.ALL_ROWS)), "w4a4")


@pytest.mark.parametrize("precision", ["w4a4", "w8a8", "w4a32"])
def test_checkpoints_give_the_network_back(precision, tmp_path):
    network, _, _, report = networks.quantized(TUNED, precision)
    path = tmp_path / "quantized.safetensors"
    save_quantized(network, path, {})
    loaded = load_quantized(path)
    x = networks.noise(2)
    with torch.no_grad():
        expected = evaluate(network, x, torch.tensor(401))
        assert torch.equal(evaluate(loaded, x, torch.tensor(401)), expected)
    assert plan_of(loaded) == plan_of(network)
    assert all(row.weight_bits <= 8 for row in report.coverage if "product" not in row.kind)


def test_folders_of_diffusers_give_the_network_back(tmp_path):
    network, *_ = networks.quantized(TUNED, "w4a4")
    network.save_pretrained(tmp_path)
    loaded = type(network).from_pretrained(tmp_path)
    with torch.no_grad():
        x = networks.noise(2)
        assert torch.equal(evaluate(loaded, x, torch.tensor(1)), evaluate(network, x, torch.tensor(1)))


def test_a_file_whose_scales_are_missing_is_refused(tmp_path, monkeypatch):
    network, *_ = networks.quantized(RECIPE, "w4a4")
    path = tmp_path / "quantized.safetensors"
    save_quantized(network, path, {})
    monkeypatch.setattr(BlockScaledLayer, "register_scales", lambda layer: None)
    with pytest.raises(ValueError, match="does not match its description.*unexpected"):
        load_quantized(path)


def test_casting_there_and_back_loses_nothing():
    network, *_ = networks.quantized(RECIPE, "w4a4")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    nn.Module.to(network, torch.bfloat16)
    nn.Module.to(network, torch.float32)
    for path in quantized_layers(network):
        for name in ("weight", "codes", "scale_codes"):
            assert torch.equal(network.state_dict()[f"{path}.{name}"], before[f"{path}.{name}"])


def test_scales_take_a_byte_in_files():
    network, *_ = networks.quantized(RECIPE, "w4a4")
    full = networks.unconditional()
    weights = set(quantized_layers(network))
    others = sum(p.numel() * 4 for name, p in full.named_parameters() if name.rpartition(".")[0] not in weights)
    biases = sum(layer.bias.numel() * 4 for layer in quantized_layers(network).values() if layer.bias is not None)
    expected = others + biases
    for path, layer in quantized_layers(network).items():
        weight = full.get_submodule(path).weight
        outputs, inputs, *kernel = weight.shape
        positions = int(np.prod(kernel)) if kernel else 1
        wide = layer.weight_bits == 8
        expected += weight.numel() if wide else -(-weight.numel() // 2)
        expected += outputs * positions * -(-inputs // (32 if wide else 16)) + (0 if wide else 4 * outputs)
    assert packed_bytes(network) == expected


def test_plans_without_blocks_are_stored_as_before():
    plan = networks.plan(networks.unconditional(), "w4a8")
    stored = plan.stored()
    assert set(stored) == {"layers", "attentions", "reasons"}
    assert set(stored["layers"]["conv_in"]) == {
        "weight_bits",
        "activation_bits",
        "splits",
        "symmetric",
        "dynamic",
        "rank",
    }
    rectified = replace(plan, rectified=("conv_act",))
    for activations in (False, True):
        assert rectified.described(activations) != plan.described(activations)


def test_a_copy_is_of_its_own():
    network, *_ = networks.quantized(RECIPE, "w4a4")
    twin = copy.deepcopy(network)
    layer = next(layer for layer in quantized_layers(twin).values() if isinstance(layer, BlockConv2d))
    layer.scale_codes += 1
    assert not layer.consistent
    assert all(layer.consistent for layer in quantized_layers(network).values())
