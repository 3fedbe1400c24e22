"""Layer by layer, what executes is what was simulated: every kind of grid that a quantised network may have."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from tests.tfmq.export.kernels import difference, exact, execute, is_integer
from tfmq.export.activations import Position
from tfmq.export.layers import ExecutableLayer, Weight, WeightOnlyLayer
from tfmq.modules.fake_quantize import StepTracker
from tfmq.modules.layers import QuantizedLayer, quantized_layer
from tfmq.plan import activation_quantizers

pytest.importorskip("openvino", reason="OpenVINO executes the layers: pip install tfmq-bench[deploy]")

STEPS = torch.tensor([1, 201, 401])


@dataclass(frozen=True)
class Case:
    """A layer, its grids, and the shape of its input."""

    weight_bits: int = 8
    activation_bits: int = 8
    linear: bool = False
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    splits: tuple[int, ...] = ()
    symmetric: bool = False
    symmetric_weight: bool = False
    range: str = "search"
    per_step: bool = False
    step_bits: tuple[int, ...] = ()
    shift: float = 0.3
    zero_point: float | None = None
    tokens: tuple[int, ...] = (9,)


CASES = {
    "symmetric weight": Case(symmetric_weight=True),
    "asymmetric weight": Case(),
    "asymmetric weight, min-max": Case(range="minmax", shift=-2.0),
    "thresholds": Case(range="thresholds"),
    "4 bits": Case(weight_bits=4),
    "4 bits far from 0": Case(weight_bits=4, shift=5.0),
    "2 bits": Case(weight_bits=2, activation_bits=4),
    "5 bits, symmetric input": Case(weight_bits=5, activation_bits=6, symmetric=True),
    "stride 2": Case(stride=2, padding=0),
    "one pixel": Case(kernel=1, padding=0, symmetric_weight=True),
    "split": Case(kernel=1, padding=0, splits=(16, 24)),
    "split, symmetric": Case(kernel=3, splits=(8, 32), symmetric_weight=True),
    "per step": Case(per_step=True),
    "per step, symmetric": Case(per_step=True, symmetric=True, symmetric_weight=True),
    "per step, split": Case(per_step=True, kernel=1, padding=0, splits=(16, 24)),
    "mixed bits": Case(per_step=True, step_bits=(8, 4, 8)),
    "zero point beyond the grid": Case(zero_point=300.0),
    "linear": Case(linear=True),
    "linear, symmetric": Case(linear=True, symmetric_weight=True),
    "linear without tokens": Case(linear=True, weight_bits=4, tokens=()),
    "linear, per step": Case(linear=True, per_step=True),
    "linear, 4 bits, per step": Case(linear=True, weight_bits=4, activation_bits=4, per_step=True),
}


def built(case: Case, seed: int) -> tuple[QuantizedLayer, torch.Tensor]:
    """A layer with ranges, and an input of three rows without values that lie half-way between two codes."""
    generator = torch.Generator().manual_seed(seed)
    plain = (
        nn.Linear(40, 24) if case.linear else nn.Conv2d(40, 24, case.kernel, stride=case.stride, padding=case.padding)
    )
    plain.weight.data = torch.randn(plain.weight.shape, generator=generator) + case.shift
    tracker = StepTracker()
    tracker.steps = STEPS
    layer = quantized_layer(
        plain, case.weight_bits, case.activation_bits, tracker, case.splits, symmetric=case.symmetric
    )
    layer.symmetric_weight = case.symmetric_weight
    layer.find_weight_range(case.range)
    layer.fold()
    x = torch.randn(2, *(case.tokens if case.linear else ()), 40, *(() if case.linear else (6, 5)), generator=generator)
    x = x * 1.5 + 0.4
    quantizers = activation_quantizers(layer).values()
    for quantizer in quantizers:
        quantizer.observe(per_step=case.per_step)
    for step, factor in zip(STEPS.tolist(), (0.7, 1.0, 1.4), strict=True):
        tracker.set(step)
        layer(x * factor)
    tracker.set(201)
    for quantizer in quantizers:
        quantizer.freeze()
        if case.step_bits:
            widths = torch.tensor(case.step_bits)
            quantizer.mix_bits(widths, quantizer.scale * 255 / (2**widths - 1), torch.tensor([90.0, 6.0, 90.0]))
        if case.zero_point is not None:
            quantizer.zero_point = torch.full_like(quantizer.zero_point, case.zero_point)
    pieces = list(x.split(case.splits, 1)) if case.splits else [x]
    for piece, quantizer in zip(pieces, quantizers, strict=True):
        scale = quantizer.scale[1] if quantizer.per_step else quantizer.scale
        beyond = (piece / scale).frac().abs() - 0.5
        piece.add_(torch.where(beyond.abs() < 1e-3, 0.01 * scale, 0.0))
    return layer, torch.cat(pieces, 1) if case.splits else x


class Together(nn.Module):
    """Many layers at once, each with an input of its own, at a time step."""

    def __init__(self, layers: list[nn.Module], position: Position) -> None:
        super().__init__()
        self.layers, self.position = nn.ModuleList(layers), position

    def forward(self, step, *inputs):
        self.position.index = step
        return tuple(layer(x) for layer, x in zip(self.layers, inputs, strict=True))


@pytest.fixture(scope="module")
def executed() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The outputs of all cases, executed and simulated; all kernels but those of side sums are of integers."""
    position = Position()
    layers, inputs = zip(*(built(case, seed) for seed, case in enumerate(CASES.values())), strict=True)
    with torch.no_grad():
        simulated = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
    together = Together([ExecutableLayer(layer, position) for layer in layers], position)
    outputs, kernels = execute(together, [torch.tensor([1]), *inputs])
    products = sum(len(layer.splits) for layer in layers)
    assert sum(map(is_integer, kernels)) == products
    return dict(zip(CASES, zip(outputs, simulated, strict=True), strict=True))


@exact
@pytest.mark.parametrize("name", CASES)
def test_a_layer_executes_what_was_simulated(executed, name):
    found, expected = executed[name]
    assert found.shape == expected.shape
    assert difference(found, expected) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_its_integers_are_those_of_the_checkpoint(name):
    layer, _ = built(CASES[name], list(CASES).index(name))
    codes = layer.codes.split(layer.splits, 1)
    for part, own in enumerate(codes):
        scale, point = layer.weight_scale[:, part], layer.weight_zero_point[:, part]
        weight = Weight(own, scale, point, layer.weight_bits)
        spread = weight.scale.shape
        rest = torch.zeros(1) if weight.rest is None else (weight.rest / scale).round().view(spread)
        assert torch.equal(weight.codes + rest, (own - point.view(spread)).expand_as(own))
        assert torch.equal(weight.codes + weight.origin.view(spread), own.to(torch.int16))
        if CASES[name].symmetric_weight:
            assert weight.rest is None


def test_a_layer_whose_input_is_not_quantised_keeps_its_arithmetic():
    layer = quantized_layer(nn.Conv2d(8, 4, 3, padding=1), 4, 32, StepTracker())
    layer.find_weight_range("search")
    layer.fold()
    x = torch.randn(2, 8, 6, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = layer(x)
    (found,), kernels = execute(WeightOnlyLayer(layer), [x])
    assert difference(found, expected) < 1e-6
    assert not any(map(is_integer, kernels))


def test_ties_are_all_that_differs_on_natural_inputs():
    """Values within 1e-5 of half-way between two codes may fall to either side; a thousandth at most are such."""
    layer, x = built(CASES["symmetric weight"], 0)
    x = x + 0.123 * torch.rand(x.shape, generator=torch.Generator().manual_seed(3))
    position = Position()
    values = ExecutableLayer(layer, position).products[0].quantizer
    (found,), _ = execute(values, [x])
    quantizer = layer.input_quantizer
    with torch.no_grad():
        differs = (found - quantizer(x)).abs() > 0.5 * quantizer.scale
    half_way = ((x / quantizer.scale).frac().abs() - 0.5).abs() < 1e-4
    assert not (differs & ~half_way).any()
    assert differs.float().mean() < 1e-3
