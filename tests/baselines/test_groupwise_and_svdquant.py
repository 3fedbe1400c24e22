"""The two rows beside the mission's: what they quantise, keep in a checkpoint and cost, in a whole network."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import DDIMPipeline
from safetensors.torch import load_file

from baselines import groupwise, nearest, svdquant
from tests.tfmq import networks
from tfmq.checkpoint import load_quantized, save_quantized
from tfmq.packing import packed_bytes
from tfmq.plan import quantized_layers
from tfmq.precision import FULL, Precision
from tfmq.quantization import quantize_

ROWS = {
    "groupwise": groupwise.METHOD.config(group=8),
    "svdquant": svdquant.METHOD.config(rank=4, group=8, images=2, candidates=3, search_rows=4),
    "nearest": nearest.METHOD.config(),
}
PRECISIONS = ["w4a32", "w8a8", "w4a8", "w4a4"]


def quantized(name, precision, build=networks.unconditional):
    unet = build()
    full = copy.deepcopy(unet)
    pool = networks.pool(networks.unconditional())
    report = quantize_(unet, Precision.parse(precision), ROWS[name].recipe(), pool, networks.generator())
    return unet, full, report


@torch.no_grad()
def error(name, precision):
    unet, full, _ = quantized(name, precision)
    x, steps = networks.noise(), torch.tensor([801, 1, 401, 201])
    expected = full(x, steps).sample
    return ((unet(x, steps).sample - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["groupwise", "svdquant"])
def test_everything_is_quantised_at_the_bits_of_the_precision(name, precision):
    _, _, report = quantized(name, precision)
    wanted = Precision.parse(precision)
    for row in report.coverage:
        boundary = row.path in ("conv_in", "conv_out")
        product = "product" in row.kind
        assert row.weight_bits == (FULL if product else 8 if boundary else wanted.weight_bits), row
        activation_bits = wanted.activation_bits
        assert row.activation_bits == (max(activation_bits, 8) if boundary else activation_bits), row


@pytest.mark.parametrize("precision", ["w4a32", "w4a8", "w4a4"])
def test_groups_are_closer_than_channels_and_branches_closer_still(precision):
    errors = {name: error(name, precision) for name in ROWS}
    assert errors["svdquant"] < errors["groupwise"] < errors["nearest"]


@torch.no_grad()
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["groupwise", "svdquant"])
def test_saved_and_reloaded_is_bit_for_bit_the_same(name, precision, tmp_path):
    unet, _, _ = quantized(name, precision)
    save_quantized(unet, tmp_path / "q.safetensors", {})
    loaded = load_quantized(tmp_path / "q.safetensors")
    x, steps = networks.noise(), torch.tensor([801, 1, 401, 201])
    assert torch.equal(loaded(x, steps).sample, unet(x, steps).sample)
    assert packed_bytes(loaded) == packed_bytes(unet)


def test_the_size_counts_codes_scales_and_sixteen_bit_branches(tmp_path):
    unet, _, _ = quantized("svdquant", "w4a8")
    path = "mid_block.resnets.0.conv1"  # 32 x 32 x 3 x 3
    save_quantized(unet, tmp_path / "q.safetensors", {})
    stored = {key: value for key, value in load_file(tmp_path / "q.safetensors").items() if key.startswith(f"{path}.")}
    sizes = {key.removeprefix(f"{path}."): value.numel() * value.element_size() for key, value in stored.items()}
    assert sizes == {
        "bias": 32 * 4,
        "codes": 32 * 32 * 9 // 2,
        "weight_scale": 32 * 4 * 4,
        "weight_zero_point": 32 * 4 * 4,
        "smoothing": 32 * 4,
        "down": 4 * 32 * 9 * 2,
        "up": 32 * 4 * 2,
    }
    assert packed_bytes(unet) == sum(
        value.numel() * value.element_size() for value in load_file(tmp_path / "q.safetensors").values()
    )


def test_a_layer_smaller_than_the_rank_is_group_wise_only():
    unet, _, report = quantized("svdquant", "w4a8")
    ranks = {path: layer.rank for path, layer in quantized_layers(unet).items()}
    assert ranks["conv_out"] == 0 and set(ranks.values()) == {0, 4}
    assert set(report.details["migration_strengths"]) == {path for path, rank in ranks.items() if rank}


@torch.no_grad()
@pytest.mark.parametrize("name", ["groupwise", "svdquant"])
def test_runs_in_the_stock_pipeline_at_steps_that_were_not_calibrated(name):
    unet, full, _ = quantized(name, "w8a8")
    images = []
    for network in (unet, full):
        pipeline = DDIMPipeline(network, networks.scheduler())
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(3)
        images.append(pipeline(2, generator, num_inference_steps=7, output_type="np").images)
    assert abs(images[0] - images[1]).mean() < 0.05 and (images[0] != images[1]).any()


@torch.no_grad()
def test_groups_apply_to_conditional_networks_too():
    unet, full, _ = quantized("groupwise", "w8a8", networks.conditional)
    context = torch.randn(4, 5, 12, generator=networks.generator())
    expected = full(networks.noise(), 401, context).sample
    assert 0 < (unet(networks.noise(), 401, context).sample - expected).norm() < 0.1 * expected.norm()
