"""Scaling the channels of a whole network: it computes what it did, with ranges that are more alike."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.tfmq import networks
from tests.tfmq.networks import recipe
from tfmq.checkpoint import load_quantized, save_quantized
from tfmq.execution import executing
from tfmq.modules.channel_scales import ChannelScales, divides_channels
from tfmq.network.backbone import backbone_of, evaluate
from tfmq.network.calibration import Spaced
from tfmq.passes.channel_scales import ScaleChannels, largest_by_group
from tfmq.passes.deployable import deployable
from tfmq.passes.grids import Grids
from tfmq.passes.low_rank import LowRankBranches, hooked
from tfmq.plan import insert_quantizers, quantized_layers
from tfmq.state import plan_of

ALL = ScaleChannels(groups=2, layers="all", data=networks.ALL_ROWS, batch=6)


def scaled(step, kind="unconditional", precision="w4a8"):
    """A network after the pass and before all others, the full-precision one, the scaled layers, and rows."""
    kind = networks.KINDS[kind]
    unet = kind.build().requires_grad_(False)
    full = copy.deepcopy(unet)
    pool = kind.pool(full)
    plan = networks.plan(full, precision, step)
    insert_quantizers(unet, plan)
    rows = step.draw(pool, networks.generator())
    networks.run(networks.session(unet, full, pool, precision, plan=plan), step, rows)
    return unet, full, {p: e for p, e in quantized_layers(unet).items() if divides_channels(e)}, rows


@torch.no_grad()
@pytest.mark.parametrize("kind", ["unconditional", "text"])
def test_the_network_computes_what_it_did(kind):
    unet, full, layers, rows = scaled(ALL, kind)
    assert layers and all((e.input_quantizer.factors != 1).any() for e in layers.values())
    found, expected = (evaluate(each, rows.latents, rows.timesteps, rows.context) for each in (unet, full))
    assert (found - expected).norm() < 1e-5 * expected.norm()


@torch.no_grad()
def test_ranges_of_channels_come_nearer_to_each_other():
    unet, full, layers, rows = scaled(ScaleChannels(groups=1, layers="all", data=networks.ALL_ROWS, most=1e4))
    groups = torch.zeros(len(rows), dtype=torch.int64)
    before, uneven = largest_by_group(full, list(layers), rows, groups, 8), 0
    for path, layer in layers.items():
        after = before[path][0] / layer.input_quantizer.factors
        torch.testing.assert_close(after, after.mean().expand_as(after), rtol=1e-3, atol=0)
        uneven += bool(before[path][0].amax() > 1.5 * before[path][0].amin())
    assert uneven > len(layers) / 2


@torch.no_grad()
def test_ranges_are_those_of_each_group_of_steps():
    unet = networks.unconditional()
    rows = networks.pool(unet).spaced(5, 4)
    groups = torch.arange(len(rows)) % 3
    found = largest_by_group(unet, ["conv_out"], rows, groups, 7)
    seen = []
    with hooked(unet, ["conv_out"], lambda path, layer, x, output: seen.append(x)):
        evaluate(unet, rows.latents, rows.timesteps)
    for group in range(3):
        expected = seen[0][groups == group].abs().amax((0, 2, 3))
        torch.testing.assert_close(found["conv_out"][group], expected)


def test_which_layers_are_scaled():
    full = networks.conditional()
    of_time = {*backbone_of(full).temporal, *backbone_of(full).embedding}
    for layers in ("convolutions", "all"):
        plan = networks.plan(full, "w4a8", ScaleChannels(layers=layers))
        found = {path for path, layer in plan.layers.items() if layer.channel_scales}
        kinds = nn.Conv2d if layers == "convolutions" else nn.Conv2d | nn.Linear
        expected = {path for path, module in full.named_modules() if isinstance(module, kinds)}
        assert found == expected - of_time
    plan = networks.plan(full, "w4a32", ScaleChannels(layers="all"))
    assert not any(layer.channel_scales for layer in plan.layers.values()), "inputs that stay as they are gain nothing"


@pytest.mark.parametrize(
    "usual", [recipe(), recipe(split_shortcuts=True), (Grids(dynamic_activations=True), *recipe())]
)
def test_a_checkpoint_holds_the_factors(usual, tmp_path):
    unet, full, pool, report = networks.quantized((*usual[:1], ALL, *usual[1:]), "w4a4")
    assert all(row.activation_bits <= 8 for row in report.coverage)
    save_quantized(unet, tmp_path / "q.safetensors", {})
    loaded = load_quantized(tmp_path / "q.safetensors")
    assert plan_of(loaded) == plan_of(unet)
    assert torch.equal(networks.KINDS["unconditional"].draw(loaded), networks.KINDS["unconditional"].draw(unet))
    factors = [e.input_quantizer.factors for e in quantized_layers(loaded).values() if divides_channels(e)]
    assert factors and isinstance(loaded.conv_out.input_quantizer, ChannelScales)


def test_integer_kernels_refuse_it_by_name():
    unet, *_ = networks.quantized((ALL, *recipe()), "w8a8")
    with pytest.raises(ValueError, match=r"conv_in cannot be executed: the channels of its input are divided"):
        executing(unet)
    with pytest.raises(ValueError, match="the recipe divides the channels of conv_in"):
        networks.quantized(deployable((ALL, *recipe())), "w8a8")


def test_smoothing_is_not_done_twice():
    branches = LowRankBranches(2, 1, 3, data=networks.ALL_ROWS, batch=6)
    with pytest.raises(
        ValueError, match="has a low-rank branch, which smooths its input: let ScaleChannels come later"
    ):
        networks.quantized((ALL, branches, *recipe()), "w8a8")
    unet, *_ = networks.quantized((branches, ALL, *recipe()), "w8a8")
    assert not any(layer.rank and divides_channels(layer) for layer in quantized_layers(unet).values())


def test_settings_are_checked():
    for wrong, message in (
        ({"strength": 1.5}, "strength is 1.5"),
        ({"most": 0.5}, "most is 0.5"),
        ({"layers": "convs"}, "unknown layers 'convs'"),
        ({"groups": 0}, "groups is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            ScaleChannels(**wrong)


def test_activations_that_are_not_finite_are_refused():
    unet = networks.unconditional()
    rows = Spaced(2, 2)(networks.pool(unet), networks.generator())
    unet.conv_in.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="the activation at conv_out holds NaN or infinity"):
        largest_by_group(unet, ["conv_out"], rows, torch.zeros(4, dtype=torch.int64), 4)
