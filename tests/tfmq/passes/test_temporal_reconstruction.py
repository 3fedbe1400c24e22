"""Reconstruction of the temporal information block: against the released code's run, and what it is good for."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel

from tests.tfmq import networks
from tests.tfmq.oracle import tensors
from tests.tfmq.released import (
    BITS,
    TIME,
    TIME_SEED,
    Recorded,
    assert_follows_published_trace,
    assert_learned_as_well_as_published,
    rounding_config,
)
from tfmq.network.backbone import backbone_of
from tfmq.passes import Cost, reconstruction
from tfmq.passes.reconstruction import RoundingConfig, learn_rounding, reconstruction_loss
from tfmq.passes.temporal_cache import temporal_feature_error
from tfmq.passes.temporal_reconstruction import FreezeTemporal, TemporalReconstruction
from tfmq.plan import SHARED, LayerPlan, QuantizationPlan, insert_quantizers, quantized_layers
from tfmq.precision import Precision
from tfmq.session import Session

PROJECTIONS = 3

TIME_NAMES = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    **{f"down_blocks.{i}.resnets.0.time_emb_proj": f"input_blocks.{i + 1}.0.emb_layers.1" for i in range(PROJECTIONS)},
}


def time_unet():
    """A UNet whose first three residual blocks have the recorded time embedding, its copy, and the recorded layers.

    The recorded run leaves the first linear layer of the time embedding in full precision.
    """
    values = tensors(TIME)
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=tuple(values[f"target{i}"].shape[1] for i in range(PROJECTIONS)),
        time_embedding_dim=values["state_dict.time_embed.0.weight"].shape[0],
        down_block_types=("DownBlock2D",) * PROJECTIONS,
        up_block_types=("UpBlock2D",) * PROJECTIONS,
        mid_block_type=None,
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=8,
    )
    for ours, theirs in TIME_NAMES.items():
        for kind in ("weight", "bias"):
            getattr(unet.get_submodule(ours), kind).data = values[f"state_dict.{theirs}.{kind}"].clone()
    unet.eval().requires_grad_(False)
    full = copy.deepcopy(unet)
    learned = tuple(TIME_NAMES)[1:]
    backbone = replace(backbone_of(unet), time_embedding=learned[:1], time_projections=learned[1:])
    insert_quantizers(unet, QuantizationPlan({path: LayerPlan(BITS, 32) for path in learned}, {}))
    for layer in quantized_layers(unet).values():
        layer.find_weight_range("search")
    return SimpleNamespace(unet=unet, full=full, backbone=backbone, timesteps=values["t"].long())


def time_losses(network):
    """Loss of each projection over all recorded rows."""
    with torch.no_grad():
        features = network.backbone.temporal_features(network.unet, network.timesteps)
        targets = network.backbone.temporal_features(network.full, network.timesteps)
    return torch.stack([reconstruction_loss(f, t, 2.0) for f, t in zip(features, targets, strict=True)])


class RepeatedSteps(Session):
    """The released code learns on a row for each image at each step, where a pool's finite set has each step once."""

    @property
    def finite_set(self):
        return tensors(TIME)["t"].long()


@pytest.fixture(scope="module")
def learned_time():
    """The network after the pass with the recorded seed, the loss terms on the way, and what it spent."""
    network = time_unet()
    config = rounding_config(TIME)
    recorded = Recorded([network.unet.get_submodule(path) for path in network.backbone.temporal], config)
    session = RepeatedSteps(
        unet=network.unet,
        full=network.full,
        backbone=network.backbone,
        plan=QuantizationPlan({}, {}),
        precision=Precision.parse("w4a32"),
        protocol=SHARED,
        pool=None,
        generator=torch.Generator().manual_seed(TIME_SEED),
    )

    def watched_learning(layers, loss, batches, settings):
        return learn_rounding(layers, recorded.watch(loss), batches, settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reconstruction, "learn_rounding", watched_learning)
        networks.run(session, TemporalReconstruction(config))
    return network, recorded, session.report.cost


def test_time_embedding_starts_where_the_published_one_does():
    values = tensors(TIME)
    network = time_unet()
    distinct = network.timesteps[:: len(network.timesteps) // len(values["sinusoid"])]
    torch.testing.assert_close(network.full.time_proj(distinct), values["sinusoid"], rtol=1e-4, atol=1e-4)
    for i, feature in enumerate(network.backbone.temporal_features(network.full, distinct)):
        torch.testing.assert_close(feature, values[f"target{i}"], rtol=1e-4, atol=1e-4)
    layers = [network.unet.get_submodule(path) for path in network.backbone.temporal]
    for path, layer in zip(network.backbone.temporal, layers, strict=True):
        theirs = TIME_NAMES[path]
        torch.testing.assert_close(layer.weight_scale, values[f"{theirs}.delta"], rtol=1e-6, atol=0)
        assert torch.equal(layer.weight_zero_point, values[f"{theirs}.zero_point"])
        layer.learn_rounding()
    torch.testing.assert_close(time_losses(network).sum(), values["loss.soft_start"], rtol=1e-3, atol=0)
    for layer in layers:
        layer.fold()
    torch.testing.assert_close(time_losses(network).sum(), values["loss.hard_start"], rtol=1e-3, atol=0)
    network = time_unet()
    for layer in quantized_layers(network.unet).values():
        layer.fold()
    torch.testing.assert_close(time_losses(network).sum(), values["loss.nearest"], rtol=1e-3, atol=0)


def test_time_embedding_is_learned_as_well_as_published(learned_time):
    network, _, cost = learned_time
    assert_learned_as_well_as_published(time_losses(network).sum(), tensors(TIME))
    assert cost == Cost(unet_evaluations=0, optimizer_steps=rounding_config(TIME).iterations)
    assert all(layer.codes is not None for layer in quantized_layers(network.unet).values())


def test_time_embedding_follows_the_published_trace(learned_time):
    network, recorded, _ = learned_time
    names = [TIME_NAMES[path] for path in network.backbone.temporal]
    assert_follows_published_trace(recorded, names, tensors(TIME))


# -- in a whole network -----------------------------------------------------------------------------------------------


def test_reconstruction_of_the_temporal_block_lowers_its_error():
    nearest, full, pool, _ = networks.quantized(networks.recipe(), "w4a32")
    recipe = networks.recipe(temporal=RoundingConfig(iterations=150, batch=5, learning_rate=2e-2))
    learned = networks.quantized(recipe, "w4a32")[0]
    backbone = backbone_of(full)
    before, after = (temporal_feature_error(unet, full, backbone, pool.timesteps).mean() for unet in (nearest, learned))
    assert after < 0.8 * before


def test_frozen_temporal_layers_are_rounded_to_nearest_in_their_min_max_ranges():
    grids, ranges, *others = networks.recipe(rounding=RoundingConfig(3), scales="temporal")
    unet, full, _, _ = networks.quantized((grids, ranges, FreezeTemporal(), *others))
    for path in backbone_of(full).temporal:
        weight = full.get_submodule(path).weight.detach()
        low, high = weight.amin(1).clamp_max(0), weight.amax(1).clamp_min(0)
        scale = (high - low) / 15
        expected = torch.fake_quantize_per_channel_affine(weight, scale, torch.round(-low / scale).int(), 0, 0, 15)
        torch.testing.assert_close(unet.get_submodule(path).weight, expected, rtol=1e-5, atol=1e-6)
