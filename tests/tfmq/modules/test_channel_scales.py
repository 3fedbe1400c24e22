"""A layer whose input channels are divided by factors computes what it did, and is stored and refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.tfmq import networks
from tfmq.modules.channel_scales import ChannelScales, divide_channels, divides_channels, set_factors
from tfmq.modules.fake_quantize import StepTracker
from tfmq.modules.layers import quantized_layer

LAYERS = {
    "linear": (lambda: nn.Linear(12, 10), (5, 7, 12)),
    "conv": (lambda: nn.Conv2d(6, 10, 3, stride=2, padding=1), (5, 6, 8, 8)),
    "pointwise": (lambda: nn.Conv2d(12, 10, 1, bias=False), (5, 12, 4, 4)),
}


def scaled(name, splits=()):
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    layer = build().requires_grad_(False)
    twin = quantized_layer(layer, 8, 8, StepTracker(), splits)
    divide_channels(twin)
    return layer, twin, torch.randn(shape)


def factors_of(layer):
    return torch.rand(layer.weight.shape[1], generator=networks.generator()) * 10 + 0.1


@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("splits", [False, True])
def test_nothing_changes_but_by_float_rounding(name, splits):
    layer, twin, x = scaled(name, (2, layer_channels(name) - 2) if splits else ())
    assert torch.equal(twin(x), layer(x)), "without factors"
    before = layer.weight.clone()
    set_factors(twin, factors_of(layer))
    torch.testing.assert_close(twin(x), layer(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.weight, before), "the full-precision layer keeps its weight"
    set_factors(twin, torch.ones(layer.weight.shape[1]))  # factors take the place of earlier ones
    torch.testing.assert_close(twin.weight, layer.weight)


def layer_channels(name):
    return LAYERS[name][0]().weight.shape[1]


@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
def test_what_is_quantised_is_the_divided_input(name):
    """With ranges of 1 to 8 and 8 bits each, a channel that was 50 times as wide as the others costs nothing more."""
    layer, twin, x = scaled(name)
    dim = -1 if name == "linear" else 1
    x.select(dim, 2).mul_(50)
    layer.weight[:, 2] /= 50
    expected, errors = layer(x), {}
    for divided in (False, True):
        twin = quantized_layer(layer, 8, 4, StepTracker())
        divide_channels(twin)
        if divided:
            factors = torch.ones(layer.weight.shape[1])
            factors[2] = 50
            set_factors(twin, factors)
        quantizer = twin.input_quantizer.quantizer
        quantizer.observe()
        twin(x)
        quantizer.freeze()
        twin.find_weight_range("minmax")
        twin.fold()
        errors[divided] = (twin(x) - expected).norm() / expected.norm()
    assert errors[True] < errors[False] / 2


def test_factors_keep_their_type_and_inputs_theirs():
    _, twin, x = scaled("conv")
    set_factors(twin, torch.full((6,), 3.0))
    twin.half()
    assert twin.input_quantizer.factors.dtype == torch.float32 and twin(x.half()).dtype == torch.float16


def test_a_layer_without_factors_or_that_is_rounded_is_refused():
    layer, twin, _ = scaled("linear")
    plain = quantized_layer(layer, 8, 8, StepTracker())
    assert divides_channels(twin) and not divides_channels(plain)
    with pytest.raises(ValueError, match="its plan has to say so"):
        set_factors(plain, torch.ones(12))
    twin.find_weight_range("minmax")
    twin.fold()
    with pytest.raises(ValueError, match="rounded already"):
        set_factors(twin, torch.ones(12))


def test_new_factors_need_a_new_range():
    _, twin, _ = scaled("linear")
    twin.find_weight_range("minmax")
    set_factors(twin, torch.full((12,), 2.0))
    with pytest.raises(ValueError, match="no range"):
        twin.fold()
    assert isinstance(twin.input_quantizer, ChannelScales)
