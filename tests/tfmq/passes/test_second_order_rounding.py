"""Rounding in closed form: nearer to full precision than rounding to nearest, planned, kept, and for every network."""

from __future__ import annotations

import copy
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.tfmq import networks
from tests.tfmq.network import test_transformer
from tfmq.cost import plan_cost
from tfmq.network.backbone import evaluate
from tfmq.network.sampling import predict_noise
from tfmq.numerics.second_order import SecondMoments
from tfmq.passes.activation_ranges import ActivationRanges
from tfmq.passes.grids import Grids
from tfmq.passes.second_order_rounding import SecondOrderRounding
from tfmq.passes.weight_ranges import RoundToNearest, WeightRanges
from tfmq.plan import quantized_layers
from tfmq.precision import Precision
from tfmq.quantization import quantize_
from tfmq.session import Session
from tfmq.workspace import FolderWorkspace

ROUNDING = SecondOrderRounding(data=networks.ALL_ROWS)
W4 = Precision.parse("w4a32")


@torch.no_grad()
def error(network, full, conditioning=None) -> float:
    found, expected = (
        predict_noise(u, networks.noise(4), torch.tensor(401), conditioning, 1.0) for u in (network, full)
    )
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_it_is_nearer_to_full_precision_than_rounding_to_nearest(share):
    rounding = SecondOrderRounding(share=share, data=networks.ALL_ROWS)
    network, full, pool, report = networks.quantized((Grids(split_shortcuts=True), rounding), "w4a32")
    nearest, *_ = networks.quantized((WeightRanges(), RoundToNearest()), "w4a32", recorded=pool)
    assert error(network, full) < 0.75 * error(nearest, full)
    assert all(row.weight_bits <= 8 for row in report.coverage if row.kind in ("conv2d", "linear"))


@pytest.mark.parametrize("kind", ["text", "transformer"])
def test_other_networks(kind):
    if kind == "transformer":
        network, full = test_transformer.transformer(), test_transformer.transformer()
        pool = test_transformer.pool(full)
    else:
        network, full = networks.conditional(), networks.conditional()
        pool = networks.KINDS[kind].pool(full)
    recipe = (ActivationRanges(networks.ALL_ROWS), ROUNDING)
    quantize_(network, Precision.parse("w4a8"), recipe, pool, networks.generator())
    rows = pool.spaced(5, 1)
    with torch.no_grad():
        found, expected = (evaluate(each, rows.latents, rows.timesteps, rows.context) for each in (network, full))
    assert (found - expected).norm() < 0.3 * expected.norm()


@pytest.mark.parametrize(("share", "evaluations"), [(0.5, 3), (0.0, 2)])
def test_what_it_spends_is_planned_and_what_was_found_is_kept(tmp_path, share, evaluations):
    full = networks.unconditional()
    pool, recipe = networks.pool(full), (SecondOrderRounding(share=share, data=networks.ALL_ROWS),)
    planned = plan_cost(networks.unconditional().to("meta"), W4, recipe, pool)
    made = []
    for _ in range(2):
        network = networks.unconditional()
        report = quantize_(network, W4, recipe, pool, networks.generator(), workspace=FolderWorkspace(tmp_path))
        spent = report.passes[0].unet_evaluations
        assert planned.costs[0][1].unet_evaluations == spent == evaluations * 20
        made.append(network.state_dict())
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


def test_memory_is_that_of_what_it_makes():
    network = networks.unconditional()
    largest = max(layer.weight[0].numel() for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear))
    pool, ways = networks.pool(network), ({"in_turn": False, "batch": 4}, {"in_turn": False, "batch": 20}, {})
    some, all_, in_turn = (
        plan_cost(network.to("meta"), W4, (SecondOrderRounding(data=networks.ALL_ROWS, **way),), pool).held
        for way in ways
    )
    assert some < all_, "rows at once take memory"
    assert 4 * 5 * largest**2 < in_turn < all_, "one layer's moments after the other's"


class Compared(SecondOrderRounding):
    """Compares the moments of each layer with those of both networks, evaluated as a whole in float64."""

    sessions: ClassVar[list[Session]] = []
    paths: ClassVar[list[str]] = []

    def run(self, session, rows):
        self.sessions[:] = [session]
        self.paths.clear()
        super().run(session, rows)

    def _round_layer(self, layer, moments):
        (session,) = self.sessions
        path = next(path for path, module in session.network.named_modules() if module is layer)
        if not path.startswith("time_embedding") and (self.in_turn or not begun(session, path)):
            expected = directly(session, path)
            for name, value in vars(expected).items():
                found = torch.as_tensor(getattr(moments, name)).double()
                largest = torch.as_tensor(value).abs().max().item()
                torch.testing.assert_close(
                    found, torch.as_tensor(value).double(), rtol=1e-3, atol=1e-4 * largest + 1e-6 * moments.count
                )
            self.paths.append(path)
        super()._round_layer(layer, moments)


def begun(session, path):
    """Whether a layer of the block that holds a layer is rounded, after moments of all were taken."""
    (block,) = (block for block in session.backbone.blocks if block.holds(path))
    return any(
        layer.codes is not None for each, layer in quantized_layers(session.network).items() if block.holds(each)
    )


def directly(session, path):
    """Second moments of a layer by patches of both networks in float64."""
    seen, rows = [], networks.ALL_ROWS(session.pool, session.generator)
    for network in (session.network, session.full):
        network = copy.deepcopy(network).double()
        for module in network.modules():
            module._forward_hooks.clear()
        layer = network.get_submodule(path)
        layer.register_forward_hook(lambda layer, args, output: seen.append((layer, args[0], output)))
        evaluate(network, rows.latents, rows.timesteps)
    (layer, x, y), (_, _, target) = seen
    x, lacking = getattr(layer, "input_quantizer", nn.Identity())(x), target - y
    if x.dim() == 4:
        patches = F.unfold(x, layer.kernel_size, padding=layer.padding, stride=layer.stride)
        x, lacking = patches.transpose(1, 2), lacking.flatten(2).transpose(1, 2)
    x, lacking = x.flatten(0, -2), lacking.flatten(0, -2)
    return SecondMoments(len(x), x.sum(0), lacking.sum(0), x.T @ x, lacking.T @ x)


@pytest.mark.parametrize("in_turn", [True, False])
def test_moments_are_those_of_the_whole_network_in_float64(in_turn):
    networks.quantized((Compared(data=networks.ALL_ROWS, batch=8, in_turn=in_turn),), "w4a32")
    assert len(Compared.paths) == len(set(Compared.paths)) > (30 if in_turn else 10)


def test_settings_that_make_no_sense_are_refused():
    for wrong in ({"share": 1.5}, {"sweeps": -1}, {"damping": -1.0}, {"range": "best"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SecondOrderRounding(**wrong)


def test_convolutions_whose_patches_are_not_known_are_refused():
    def grouped():
        network = networks.unconditional()
        network.conv_out = nn.Conv2d(16, 3, 3, padding=2, dilation=2)
        return network

    with pytest.raises(ValueError, match="dilation"):
        networks.quantized((ROUNDING,), "w4a32", build=grouped)
