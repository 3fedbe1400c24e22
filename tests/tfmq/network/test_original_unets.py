"""The UNets of the original checkpoints: their blocks are their forward pass, and every layer is accounted for."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

from benchmarks.sources.originals.keys import latent_unet
from tests import checkpoints
from tests.tfmq import networks, originals
from tfmq.checkpoint import load_quantized, save_quantized
from tfmq.network.attention_heads import restore_attention_heads, set_attention_heads
from tfmq.network.backbone import backbone_of, full_precision_bytes
from tfmq.network.calibration import CalibrationRows
from tfmq.packing import packed_bytes
from tfmq.passes.grids import Grids
from tfmq.passes.reconstruction import RoundingConfig
from tfmq.plan import Protocol, insert_quantizers
from tfmq.precision import Precision
from tfmq.quantization import quantize_
from tfmq.state import coverage

# Families whose residual blocks resample.
RESAMPLING = [
    name for name in originals.FAMILIES if originals.described(name)["full"].get("downsample_type") == "resnet"
]
MIB = 2**20


@pytest.mark.parametrize("family", originals.FAMILIES)
@torch.no_grad()
def test_blocks_in_order_are_the_forward_pass(family):
    unet = originals.tiny(family)
    arguments = originals.arguments(unet)
    backbone = backbone_of(unet)
    hidden, skips, embedding = arguments[0], [], backbone.time_input(unet, arguments[1])
    for block in backbone.blocks:
        if block.pop:
            hidden = torch.cat([hidden, skips.pop()], 1)
        hidden = backbone.run_block(unet, block, hidden, embedding, *(arguments[2:] or (None,)))
        if block.push:
            skips.append(hidden)
    assert not skips
    assert torch.equal(hidden, unet(*arguments).sample)


@pytest.mark.parametrize("family", originals.FAMILIES)
def test_every_layer_of_the_real_network_is_quantised(family):
    unet = originals.full_size(family)
    assert sum(parameter.numel() for parameter in unet.parameters()) == originals.described(family)["parameters"]
    layers = {path for path, module in unet.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    backbone = backbone_of(unet)
    insert_quantizers(unet, networks.plan(unet, "w4a8", Grids(split_shortcuts=True)))
    rows = coverage(unet)
    assert not any(row.reason for row in rows)
    assert {row.path for row in rows if "product" not in row.kind} == layers
    assert sorted(row.path for row in rows if "product" in row.kind) == sorted(2 * list(backbone.attentions))
    bits = {row.path: (row.weight_bits, row.activation_bits) for row in rows if "product" not in row.kind}
    assert bits.pop("conv_in") == bits.pop("conv_out") == (8, 8)
    assert set(bits.values()) == {(4, 8)}


@pytest.mark.parametrize("family", originals.FAMILIES)
def test_roles_are_what_they_say(family):
    """Told apart here by shapes and strides, where the backbone goes by classes and paths."""
    unet = originals.full_size(family)
    backbone, modules = backbone_of(unet), dict(unet.named_modules())
    convolutions = {path: module for path, module in modules.items() if isinstance(module, nn.Conv2d)}
    assert set(backbone.roles["downsampling"]) == {
        path for path, layer in convolutions.items() if layer.stride == (2, 2)
    }
    pointwise = {path for path, layer in convolutions.items() if layer.kernel_size == (1, 1)}
    assert set(backbone.roles["shortcuts"]) == {path for path in pointwise if "proj_" not in path}
    assert set(backbone.shortcut_splits) == {
        path for path in backbone.roles["shortcuts"] if path.startswith("up_blocks.")
    }
    assert all(sum(split) == modules[path].in_channels for path, split in backbone.shortcut_splits.items())
    embedding = unet.time_embedding.linear_2.out_features
    taking = {path for path, layer in modules.items() if isinstance(layer, nn.Linear) and "emb" in path}
    assert set(backbone.temporal) == taking
    assert all(modules[path].in_features == embedding for path in backbone.time_projections)
    assert set(backbone.attentions) == {path.rpartition(".")[0] for path in modules if path.endswith("to_q")}


@pytest.mark.parametrize("family", RESAMPLING)
@torch.no_grad()
def test_time_projections_of_down_and_upsampling_blocks_are_temporal_features(family):
    unet = originals.tiny(family)
    backbone = backbone_of(unet)
    assert not backbone.roles["downsampling"], "a block that averages pixels has no convolution that downsamples"
    resampling = {path for path, _ in unet.named_modules() if re.search(r"samplers\.\d+\.time_emb_proj", path)}
    assert any("down" in path for path in resampling) and any("up" in path for path in resampling)
    assert resampling <= set(backbone.time_projections)
    seen = {}
    for path in backbone.time_projections:
        unet.get_submodule(path).register_forward_hook(lambda m, a, output, path=path: seen.update({path: output}))
    arguments = originals.arguments(unet)
    unet(*arguments)
    called = dict(seen)
    features = backbone.temporal_features(unet, arguments[1])
    for path, feature in zip(backbone.time_projections, features, strict=True):
        assert torch.equal(called[path], feature)


@pytest.mark.parametrize("family", [name for name in originals.FAMILIES if "sizes" in originals.described(name)])
def test_networks_have_the_published_sizes(family):
    """The sizes of the paper's tables (MB there) fit in MiB: the unquantised one is the count of parameters."""
    unet, sizes = originals.full_size(family), dict(originals.described(family)["sizes"])
    assert round(full_precision_bytes(unet) / MIB) == sizes.pop("w32a32")
    for text, expected in sizes.items():
        planned = copy.deepcopy(unet)
        insert_quantizers(planned, networks.plan(planned, text))
        assert packed_bytes(planned) / MIB == pytest.approx(expected, rel=0.01)


def quantized(unet):
    latents, _, *context = originals.arguments(unet, 4)
    timesteps = torch.tensor([951, 501, 1, 501])
    rows = CalibrationRows(latents, timesteps, *context)
    recipe = networks.recipe(
        rounding=RoundingConfig(iterations=2, batch=4),
        temporal=RoundingConfig(iterations=2, batch=3),
        scales="temporal",
        split_shortcuts=True,
        data=networks.drawing(rows),
    )
    report = quantize_(unet, Precision.parse("w4a8"), recipe, networks.pool_of(rows), networks.generator())
    return rows, report


@pytest.mark.parametrize("family", originals.DISTINCT)
@torch.no_grad()
def test_tiny_originals_are_quantised_and_survive_their_checkpoint(family, tmp_path):
    unet = originals.tiny(family)
    full = copy.deepcopy(unet)
    rows, report = quantized(unet)
    assert not any(row.reason for row in report.coverage)
    arguments = (rows.latents, rows.timesteps, *([] if rows.context is None else [rows.context]))
    expected, found = full(*arguments).sample, unet(*arguments).sample
    assert 0 < (found - expected).norm() / expected.norm() < 1
    planned = copy.deepcopy(full).to("meta")
    insert_quantizers(planned, networks.plan(planned, "w4a8", Grids(split_shortcuts=True)))
    tables = 8 * 2 * len(backbone_of(full).temporal)
    assert packed_bytes(planned) + tables == packed_bytes(unet), "a plan's size is that of the checkpoint"
    save_quantized(unet, tmp_path / "q.safetensors", {})
    assert torch.equal(load_quantized(tmp_path / "q.safetensors")(*arguments).sample, found)


# -- attention heads --------------------------------------------------------------------------------------------------


def with_four_heads() -> UNet2DModel:
    unet = networks.unconditional()
    set_attention_heads(unet, 4)
    return unet


@torch.no_grad()
def test_heads_are_set_noted_copied_and_restored(tmp_path):
    unet = with_four_heads()
    arguments = (networks.noise(2), torch.tensor([1, 701]))
    expected = unet(*arguments).sample
    assert (expected - networks.unconditional()(*arguments).sample).abs().max() > 1e-3
    assert torch.equal(copy.deepcopy(unet)(*arguments).sample, expected)
    unet.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["attention_heads"] == 4
    for loaded in (UNet2DModel.from_pretrained(tmp_path), UNet2DModel.from_config(unet.config)):
        loaded.load_state_dict(unet.state_dict())
        assert not torch.allclose(loaded(*arguments).sample, expected, atol=1e-4), "it is lost without a word"
        restore_attention_heads(loaded)
        assert torch.equal(loaded(*arguments).sample, expected)
    plain = networks.unconditional()
    before = plain(*arguments).sample
    restore_attention_heads(plain)
    assert torch.equal(plain(*arguments).sample, before)


@torch.no_grad()
def test_a_quantised_checkpoint_keeps_the_heads(tmp_path):
    unet, _, pool, _ = networks.quantized(networks.recipe(), build=with_four_heads)
    rows = pool.spaced(5, 4)
    save_quantized(unet, tmp_path / "q.safetensors", {})
    loaded = load_quantized(tmp_path / "q.safetensors")
    assert loaded.config.attention_heads == 4
    found = loaded(rows.latents, rows.timesteps).sample
    assert torch.equal(found, unet(rows.latents, rows.timesteps).sample)
    set_attention_heads(loaded, 2)
    assert not torch.allclose(loaded(rows.latents, rows.timesteps).sample, found, atol=1e-4)


WITH_HEADS = [family for family in checkpoints.FAMILIES if checkpoints.heads(family) is not None]


@pytest.mark.parametrize("family", checkpoints.those("model whose heads its settings cannot say", WITH_HEADS))
@torch.no_grad()
def test_with_its_heads_it_is_the_original_network(family, tmp_path):
    """Which the configuration alone is not; and the quantised one stays near it after saving and loading."""
    stored, oracle = checkpoints.weights(family), checkpoints.outputs(family)
    averaged = "unet_out_ema" in oracle
    unet = originals.build(checkpoints.described(family)["tiny"]["diffusers_unet"], checkpoints.heads(family))
    weights = {}
    for source in latent_unet(unet):
        source = source.averaged() if averaged else source
        weights |= source.split(stored[source.key])
    unet.load_state_dict(weights)
    arguments, expected = (oracle["x"], oracle["t"]), oracle["unet_out_ema" if averaged else "unet_out_raw"]
    torch.testing.assert_close(unet(*arguments).sample, expected, rtol=0, atol=1e-5)
    without = UNet2DModel.from_config(unet.config)
    without.load_state_dict(weights)
    assert (without(*arguments).sample - expected).abs().max() > 1e-2
    rows = CalibrationRows(oracle["x"].repeat(4, 1, 1, 1), oracle["t"].repeat(4))
    recipe = networks.recipe(scales="temporal", data=networks.drawing(rows))
    quantize_(unet, Precision.parse("w8a8"), recipe, networks.pool_of(rows), networks.generator())
    save_quantized(unet, tmp_path / "q.safetensors", {})
    found = load_quantized(tmp_path / "q.safetensors")(*arguments).sample
    assert (found - expected).norm() < 0.1 * expected.norm()


def test_heads_that_do_not_fit_are_refused_and_nothing_is_changed():
    unet = networks.unconditional()
    with pytest.raises(ValueError, match=r"attentions.0 has 32 channels, which 5 heads do not divide"):
        set_attention_heads(unet, 5)
    assert "attention_heads" not in unet.config
    with pytest.raises(ValueError, match="a UNet2DConditionModel says in its config"):
        set_attention_heads(networks.conditional(), 4)


@pytest.mark.parametrize("family", RESAMPLING)
def test_protocols_leave_out_no_block_that_averages(family):
    """TFMQ-DM's code leaves strided convolutions in full precision; down-sampling blocks that average have none."""
    unet = originals.full_size(family)
    plan = networks.plan(unet, "w4a8", protocol=Protocol("published", {"downsampling": 32}))
    assert not plan.reasons
