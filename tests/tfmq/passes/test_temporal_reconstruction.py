"""Reconstruction of the temporal information block: against the released code's run, and what it is good for."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from tests.tfmq import networks
from tests.tfmq.oracle import described, tensors
from tests.tfmq.released import (
    TIME,
    Recorded,
    assert_follows_published_trace,
    assert_learned_as_well_as_published,
    assert_starts_alike,
    bits,
    learned_layers,
    learning,
    rounding_config,
    seed,
)
from tfmq.network.backbone import backbone_of
from tfmq.passes import Cost, reconstruction
from tfmq.passes.reconstruction import RoundingConfig, learn_rounding, reconstruction_loss
from tfmq.passes.temporal_cache import temporal_feature_error
from tfmq.passes.temporal_reconstruction import FreezeTemporal, TemporalReconstruction
from tfmq.plan import SHARED, LayerPlan, QuantizationPlan, insert_quantizers, quantized_layers
from tfmq.precision import Precision
from tfmq.session import Session

EMBEDDING = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}


def original_names():
    """The original name of each layer of the temporal block, by its path in `time_unet`."""
    matches = [re.fullmatch(r"state_dict\.(.*\.emb_layers\.1)\.weight", name) for name in described(TIME)["tensors"]]
    projections = [match[1] for match in matches if match]
    return EMBEDDING | {f"down_blocks.{i}.resnets.0.time_emb_proj": name for i, name in enumerate(projections)}


def distinct(timesteps):
    """Each once, in the order of their first row."""
    return torch.tensor(list(dict.fromkeys(timesteps.tolist())))


def time_unet():
    """A UNet whose residual blocks on the way down have the recorded time embedding, its copy, and the recorded layers.

    Layers without a recorded rounding stay in full precision.
    """
    values, names = tensors(TIME), original_names()
    width, stages = values["sinusoid"].shape[1], len(names) - len(EMBEDDING)
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(width,) * stages,
        down_block_types=("DownBlock2D",) * stages,
        up_block_types=("UpBlock2D",) * stages,
        mid_block_type=None,
        layers_per_block=1,
        norm_num_groups=1,
        cross_attention_dim=8,
    )
    for path, name in names.items():
        weight, bias = (values[f"state_dict.{name}.{kind}"].clone() for kind in ("weight", "bias"))
        layer = nn.Linear(*reversed(weight.shape))
        layer.weight.data, layer.bias.data = weight, bias
        unet.set_submodule(path, layer)
    unet.eval().requires_grad_(False)
    full = copy.deepcopy(unet)
    learned = tuple(path for path, name in names.items() if name in learned_layers(TIME))
    backbone = replace(
        backbone_of(unet),
        time_embedding=tuple(path for path in learned if path in EMBEDDING),
        time_projections=tuple(path for path in names if path not in EMBEDDING),
    )
    insert_quantizers(unet, QuantizationPlan({path: LayerPlan(bits(TIME), 32) for path in learned}, {}))
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
    recorded = Recorded([network.unet.get_submodule(path) for path in network.backbone.temporal], TIME)
    session = RepeatedSteps(
        network=network.unet,
        full=network.full,
        backbone=network.backbone,
        plan=QuantizationPlan({}, {}),
        precision=Precision(bits(TIME), 32),
        protocol=SHARED,
        pool=None,
        generator=torch.Generator().manual_seed(seed(TIME)),
    )

    def watched_learning(layers, loss, batches, settings):
        return learn_rounding(layers, recorded.watch(loss), batches, settings)

    with learning(TIME) as patch:
        patch.setattr(reconstruction, "learn_rounding", watched_learning)
        networks.run(session, TemporalReconstruction(recorded.config))
    return network, recorded, session.report.cost


def test_time_embedding_starts_where_the_published_one_does():
    values = tensors(TIME)
    network = time_unet()
    steps, names = distinct(network.timesteps), original_names()
    torch.testing.assert_close(network.full.time_proj(steps), values["sinusoid"], rtol=1e-4, atol=1e-4)
    for i, feature in enumerate(network.backbone.temporal_features(network.full, steps)):
        torch.testing.assert_close(feature, values[f"target{i}"], rtol=1e-4, atol=1e-4)
    layers = quantized_layers(network.unet)
    for path, layer in layers.items():
        torch.testing.assert_close(layer.weight_scale, values[f"{names[path]}.delta"], rtol=1e-6, atol=0)
        assert torch.equal(layer.weight_zero_point, values[f"{names[path]}.zero_point"])
        layer.learn_rounding()
    assert_starts_alike(time_losses(network).sum(), "loss.soft_start", TIME)
    for layer in layers.values():
        layer.fold()
    assert_starts_alike(time_losses(network).sum(), "loss.hard_start", TIME)
    network = time_unet()
    for layer in quantized_layers(network.unet).values():
        layer.fold()
    assert_starts_alike(time_losses(network).sum(), "loss.nearest", TIME)


def test_time_embedding_is_learned_as_well_as_published(learned_time):
    network, _, cost = learned_time
    assert_learned_as_well_as_published(time_losses(network).sum(), TIME)
    assert cost == Cost(unet_evaluations=0, optimizer_steps=rounding_config(TIME).iterations)
    assert all(layer.codes is not None for layer in quantized_layers(network.unet).values())


def test_time_embedding_follows_the_published_trace(learned_time):
    _, recorded, _ = learned_time
    assert_follows_published_trace(recorded, TIME)


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
