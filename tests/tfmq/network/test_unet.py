"""The backbone must describe the forward pass exactly: streaming reconstruction evaluates blocks by it."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet1DModel

from tests.tfmq import networks
from tfmq.network.backbone import backbone_of
from tfmq.passes.grids import Grids
from tfmq.plan import insert_quantizers
from tfmq.state import coverage

TIMESTEPS = torch.tensor([1, 701])


def inputs(unet: torch.nn.Module) -> tuple[torch.Tensor, ...]:
    context = torch.randn(2, 5, 12, generator=networks.generator())
    return (networks.noise(2), TIMESTEPS) + ((context,) if hasattr(unet, "encoder_hid_proj") else ())


@torch.no_grad()
def test_a_random_condition_is_a_context_or_none():
    cpu, generator = torch.device("cpu"), networks.generator()
    assert backbone_of(networks.unconditional()).random_condition(networks.unconditional(), 2, 5, cpu) is None
    unet = networks.conditional()
    found = backbone_of(unet).random_condition(unet, 2, 7, cpu, generator)
    assert found.shape == (2, 7, 12)
    unet(networks.noise(2), TIMESTEPS, found)


@pytest.mark.parametrize("build", [networks.unconditional, networks.conditional])
@torch.no_grad()
def test_blocks_in_order_are_the_forward_pass(build):
    unet = build()
    arguments = inputs(unet)
    context = arguments[2] if len(arguments) > 2 else None
    backbone = backbone_of(unet)
    hidden, skips, embedding = arguments[0], [], backbone.time_input(unet, TIMESTEPS)
    for block in backbone.blocks:
        if block.pop:
            hidden = torch.cat([hidden, skips.pop()], 1)
        hidden = backbone.run_block(unet, block, hidden, embedding, context)
        if block.push:
            skips.append(hidden)
    assert not skips
    assert torch.equal(hidden, unet(*arguments).sample)


@pytest.mark.parametrize("build", [networks.unconditional, networks.conditional])
@torch.no_grad()
def test_shortcut_splits_are_decoder_then_skip_channels(build):
    unet = build()
    seen = {}

    def record(path: str):
        return lambda module, arguments: seen.update({path: arguments[0].shape[1]})

    backbone = backbone_of(unet)
    for path in backbone.shortcut_splits:
        unet.get_submodule(path).register_forward_pre_hook(record(path))
    hidden = []
    for stage in unet.up_blocks:
        stage.register_forward_pre_hook(
            lambda module, arguments, kwargs: hidden.append(kwargs.get("hidden_states", *arguments[:1]).shape[1]),
            with_kwargs=True,
        )
    unet(*inputs(unet))
    assert seen == {path: sum(split) for path, split in backbone.shortcut_splits.items()}
    firsts = [backbone.shortcut_splits[f"up_blocks.{i}.resnets.0.conv_shortcut"][0] for i in range(len(hidden))]
    assert firsts == hidden


@torch.no_grad()
def test_temporal_features_are_what_the_residual_blocks_add():
    unet = networks.unconditional()
    backbone = backbone_of(unet)
    seen = []
    for path in backbone.time_projections:
        unet.get_submodule(path).register_forward_hook(lambda module, arguments, output: seen.append(output))
    unet(*inputs(unet))
    features = backbone.temporal_features(unet, TIMESTEPS)
    assert len(backbone.time_projections) == len(unet.down_blocks[0].resnets) * 2 + 2 + 4
    called = sorted((tensor for tensor in seen[: len(features)]), key=lambda tensor: tensor.sum().item())
    assert all(torch.equal(a, b) for a, b in zip(called, sorted(features, key=lambda t: t.sum().item()), strict=True))


@pytest.mark.parametrize("build", [networks.unconditional, networks.conditional])
@torch.no_grad()
def test_inserted_quantizers_change_nothing_until_calibrated_and_cover_every_layer(build):
    unet = build()
    arguments = inputs(unet)
    expected = unet(*arguments).sample
    layers = [m for m in unet.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    backbone = backbone_of(unet)
    insert_quantizers(unet, networks.plan(unet, "w4a8", Grids(split_shortcuts=True)))
    torch.testing.assert_close(unet(*arguments).sample, expected, rtol=1e-5, atol=1e-5)
    rows = coverage(unet)
    bits = {row.path: (row.weight_bits, row.activation_bits) for row in rows if row.kind in ("conv2d", "linear")}
    assert len(bits) == len(layers) and len(rows) == len(layers) + 2 * len(backbone.attentions)
    assert bits.pop("conv_in") == bits.pop("conv_out") == (8, 8)
    assert set(bits.values()) == {(4, 8)}
    assert not any(row.reason for row in rows)


def test_weight_only_precision_says_why_activations_are_left():
    unet = networks.unconditional()
    insert_quantizers(unet, networks.plan(unet, "w4a32"))
    assert all(row.reason for row in coverage(unet) if row.activation_bits == 32)


def test_other_networks_are_refused():
    with pytest.raises(ValueError, match="UNet1DModel is not supported"):
        backbone_of(
            UNet1DModel(block_out_channels=(8,), down_block_types=("DownBlock1D",), up_block_types=("UpBlock1D",))
        )


def test_parts_that_streaming_would_leave_out_are_refused():
    unet = networks.unconditional()
    unet.class_embedding = torch.nn.Embedding(3, 4)
    with pytest.raises(ValueError, match=r"the UNet has class_embedding\.weight"):
        backbone_of(unet)
