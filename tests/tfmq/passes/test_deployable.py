"""Grids that integer kernels execute: symmetric weights at 8 bits and attention operands, under every range search."""

from __future__ import annotations

import pytest
import torch

from baselines import DEPLOYABLE, recipe_under
from benchmarks.suite import discover
from tests.baselines.test_contract import METHODS, small
from tests.tfmq import networks
from tests.tfmq.numerics.test_observer import criterion
from tfmq.numerics.affine import Grid, affine_from_range
from tfmq.numerics.observer import minmax, search, thresholds
from tfmq.passes.deployable import Deployable, deployable
from tfmq.passes.grids import Grids
from tfmq.passes.weight_ranges import RoundToNearest, WeightRanges
from tfmq.plan import SHARED, activation_quantizers, quantized_layers
from tfmq.precision import Precision
from tfmq.quantization import quantize_

SEARCHES = {"minmax": minmax, "search": search, "thresholds": thresholds}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_whose_grids_can_be_executed_takes_symmetric_ones(name):
    method = discover.method(name)
    if not method.executable:
        assert method.protocol("deployable") is None and "integer kernels" in method.lacks("deployable")
        return
    precision = Precision.parse("w8a8" if not method.objection(Precision.parse("w8a8")) else "w4a8")
    network = networks.unconditional()
    recipe = recipe_under("deployable", small(method))
    quantize_(network, precision, recipe, networks.pool(network), networks.generator(), method.protocol("deployable"))
    for path, layer in quantized_layers(network).items():
        assert layer.weight_bits < 8 or (layer.weight_zero_point == 128).all(), path
    for path, quantizer in activation_quantizers(network).items():
        if ".processor." in path:
            assert quantizer.symmetric or quantizer.positive, path
            assert not quantizer.zero_point.any(), path


@pytest.mark.parametrize("name", SEARCHES)
def test_codes_around_128_are_those_of_the_signed_grid(name):
    network, *_ = networks.quantized(deployable((WeightRanges(name), RoundToNearest())), "w8a32")
    full = networks.unconditional()
    for path, layer in quantized_layers(network).items():
        rows = full.get_submodule(path).weight.flatten(1)
        scale, _ = SEARCHES[name](rows, 8, True)
        assert torch.equal(layer.weight_scale[:, 0], scale)
        if name == "minmax":
            torch.testing.assert_close(scale, rows.abs().amax(1) / 127)
        signed = torch.clamp((rows / scale[:, None]).round(), -128, 127)
        assert torch.equal(layer.codes.flatten(1) - 128.0, signed)


def test_weights_of_4_bits_keep_their_ranges():
    recipe = (WeightRanges(), RoundToNearest())
    plain, *_ = networks.quantized(recipe, "w4a32")
    found, *_ = networks.quantized(deployable(recipe), "w4a32")
    other = quantized_layers(plain)
    for path, layer in quantized_layers(found).items():
        assert layer.weight_bits == 8 or torch.equal(layer.codes, other[path].codes)


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("sign", ["both", "positive"])
def test_symmetric_thresholds_are_the_best_of_all(bits, sign):
    rows = torch.randn(3, 500, generator=torch.Generator().manual_seed(5)) * torch.tensor([[1.0], [0.1], [30.0]])
    rows[2, 0] = 300
    rows = rows.abs() if sign == "positive" else rows
    found = criterion(rows, *thresholds(rows, bits, symmetric=True), Grid.signed(bits))
    for c in range(1, 101):
        threshold = rows.abs().amax(1) / 100 * c
        candidate = affine_from_range(-threshold, threshold, bits, symmetric=True)
        assert (found <= criterion(rows, *candidate, Grid.signed(bits)) * (1 + 1e-5)).all()


def test_dynamic_grids_are_refused_before_anything_runs():
    recipe = deployable((Grids(dynamic_activations=True), WeightRanges(), RoundToNearest()))
    with pytest.raises(ValueError, match=r"gives conv_in dynamic ranges, which integer kernels do not execute"):
        networks.quantized(recipe, "w8a8")


def test_the_protocol_has_the_shared_layers():
    assert DEPLOYABLE.bits == SHARED.bits and DEPLOYABLE.name == "deployable"
    config = small(discover.method("nearest"))
    assert recipe_under("deployable", config) == (Deployable(), *config.recipe())
    assert recipe_under("shared", config) == config.recipe()
