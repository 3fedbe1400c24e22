"""Layers in integers against their closed form in float64, and attention against its simulation."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.nn import functional as F

from tfmq.modules.attention import QuantizedAttention
from tfmq.modules.fake_quantize import FakeQuantize, StepTracker
from tfmq.modules.integer import IntegerLayer, IntegerWeight
from tfmq.modules.integer_attention import IntegerAttention, in_bytes, in_floats
from tfmq.modules.integer_products import InputGrid, Packed, Window, cpu_is_exact, exact_bmm, exact_parts, part_sizes
from tfmq.modules.layers import quantized_layer

pytestmark = pytest.mark.skipif(not cpu_is_exact(), reason="the 8-bit kernels of this processor are not exact")
RELATIVE = 1e-6
STEPS = torch.tensor([1, 401, 801])


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def set_grids(quantizer: FakeQuantize, scale: list[float], zero_point: list[float]) -> None:
    quantizer.scale, quantizer.zero_point = torch.tensor(scale), torch.tensor(zero_point)
    quantizer.enabled = True


def layer_of(
    module: nn.Conv2d | nn.Linear,
    bits: int = 8,
    activation_bits: int = 8,
    points: tuple[float, ...] = (117.0,),
    splits: tuple[int, ...] = (),
    symmetric: bool = False,
    weight_range: str = "minmax",
):
    """A folded quantised layer; its input has a grid with each of the zero points, at time steps where several."""
    torch.manual_seed(1)
    tracker = StepTracker()
    tracker.steps = STEPS
    layer = quantized_layer(module.requires_grad_(False), bits, activation_bits, tracker, splits, symmetric)
    layer.find_weight_range(weight_range)
    layer.fold()
    for number, part in enumerate(quantizer for quantizer in layer.modules() if isinstance(quantizer, FakeQuantize)):
        scales = [(5.5 + number + i) / (2**activation_bits - 1) for i in range(len(points))]
        set_grids(part, scales, list(points))
    return layer, tracker


def closed_form(layer, x: torch.Tensor, step: int = 0) -> torch.Tensor:
    """s_x s_w[c] sum (q_x - z_x) (q_w - z_w[c]) + b[c] in float64, on the codes of the simulation."""
    parts = [part for part in layer.modules() if isinstance(part, FakeQuantize)]
    dim = 1 if isinstance(layer, nn.Conv2d) else -1
    total = 0
    for number, (piece, codes) in enumerate(
        zip(x.split(layer.splits, dim), layer.codes.split(layer.splits, 1), strict=True)
    ):
        part = parts[number]
        row = step if len(part.scale) > 1 else 0
        scale, point = part.scale[row], part.zero_point[row]
        centred = (torch.round(piece / scale) + point).clamp(part.grid.qmin, part.grid.qmax).double() - point
        per_channel = (-1, *[1] * (codes.dim() - 1))
        weight = codes.double() - layer.weight_zero_point[:, number].double().view(per_channel)
        factor = scale.double() * layer.weight_scale[:, number].double().view(per_channel)
        if isinstance(layer, nn.Conv2d):
            product = F.conv2d(centred, weight, None, layer.stride, layer.padding, layer.dilation)
            total = total + product * factor.view(-1, 1, 1)
        else:
            total = total + F.linear(centred, weight) * factor.flatten()
    bias = 0 if layer.bias is None else layer.bias.double().view((-1, 1, 1) if dim == 1 else (-1,))
    return total + bias


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == torch.float32 and found.shape == expected.shape
    assert (found.double() - expected).abs().max() <= RELATIVE * expected.abs().max()


CONVOLUTIONS = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "1x1": {"kernel_size": 1},
    "stride 2": {"kernel_size": 3, "padding": 1, "stride": 2},
    "stride 2, unpadded": {"kernel_size": 3, "stride": 2},
    "1x1, stride 2": {"kernel_size": 1, "stride": 2},
    "3x1, without bias": {"kernel_size": (3, 1), "padding": (1, 0), "bias": False},
    "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "padded by more than half": {"kernel_size": 3, "padding": 2},
}
# An input's zero point in the middle, at an end, and outside the codes on both sides.
POINTS = [117.0, 0.0, -40.0, 300.0]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
def test_a_convolution_is_its_closed_form(options, point, bits):
    torch.manual_seed(0)
    layer, tracker = layer_of(nn.Conv2d(24, 20, **options), bits, points=(point,))
    x = random(3, 24, 9, 7)
    assert_close(IntegerLayer(layer, tracker)(x), closed_form(layer, x))
    in_memory = x.contiguous(memory_format=torch.channels_last)
    assert_close(IntegerLayer(layer, tracker)(in_memory), closed_form(layer, x))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("shape", [(5, 24), (3, 7, 24), (300, 4, 24)])
def test_a_linear_layer_is_its_closed_form(shape, point, bits):
    torch.manual_seed(0)
    layer, tracker = layer_of(nn.Linear(24, 20), bits, points=(point,))
    x = random(*shape)
    assert_close(IntegerLayer(layer, tracker)(x), closed_form(layer, x))


def test_signed_inputs_of_four_bits():
    torch.manual_seed(0)
    for module, x in ((nn.Conv2d(24, 20, 3, padding=1), random(3, 24, 8, 8)), (nn.Linear(24, 20), random(3, 24))):
        layer, tracker = layer_of(module, 4, 4, points=(0.0,), symmetric=True)
        assert_close(IntegerLayer(layer, tracker)(x), closed_form(layer, x))


def test_weights_far_from_zero():
    """Zero points of weights outside their codes, on both sides."""
    torch.manual_seed(0)
    layer, tracker = layer_of(nn.Linear(24, 20))
    layer.weight_zero_point[::2] = -300.0
    layer.weight_zero_point[1::4] = 700.0
    x = random(9, 24)
    assert_close(IntegerLayer(layer, tracker)(x), closed_form(layer, x))


def test_split_inputs_are_two_products():
    torch.manual_seed(0)
    layer, tracker = layer_of(nn.Conv2d(24, 20, 1), splits=(10, 14))
    x = random(3, 24, 8, 8)
    executed = IntegerLayer(layer, tracker)
    assert len(executed.weights) == 2
    assert_close(executed(x), closed_form(layer, x))


def test_each_row_has_the_grid_of_its_time_step():
    torch.manual_seed(0)
    for module, x in ((nn.Conv2d(24, 20, 3, padding=1), random(4, 24, 8, 8)), (nn.Linear(24, 20), random(4, 5, 24))):
        layer, tracker = layer_of(module, points=(100.0, 117.0, 160.0))
        executed = IntegerLayer(layer, tracker)
        rows = [2, 0, 1, 2]
        tracker.set(STEPS[rows])
        found = executed(x)
        for row, step in enumerate(rows):
            assert_close(found[row : row + 1], closed_form(layer, x[row : row + 1], step))
        tracker.set(STEPS[1])
        assert_close(executed(x), closed_form(layer, x, 1))


def test_codes_are_those_of_simulation_at_ties_too():
    """Every half step and its neighbours in float32, in grids of even and odd zero points."""
    for scale, point in ((0.25, 3), (0.0234, 116), (0.0234, 117), (1e-3, -40), (1e-3, 5_000_000)):
        halves = torch.arange(-600, 600) * (scale / 2)
        x = torch.cat([halves, torch.nextafter(halves, halves + 1), torch.nextafter(halves, halves - 1), halves * 1e6])
        expected = (torch.round(torch.div(x, scale)) + point).clamp(0, 255)
        assert torch.equal(InputGrid(scale, point, 255).codes(x).float(), expected)


@pytest.mark.parametrize(("bits", "point"), [(8, 117.0), (4, 0.0), (8, 300.0)])
@pytest.mark.parametrize("name", [*CONVOLUTIONS, "linear"])
def test_other_devices_compute_the_same_sums(name, bits, point, monkeypatch):
    """What runs on CUDA, on the CPU: 8-bit matrix products, and products of centred codes in floats."""
    monkeypatch.setattr("tfmq.modules.integer_products.WINDOWS", 20_000)  # one or two images at a time
    torch.manual_seed(0)
    module = nn.Linear(21, 19) if name == "linear" else nn.Conv2d(21, 19, **CONVOLUTIONS[name])
    x = random(40, 21) if name == "linear" else random(3, 21, 9, 7)
    layer, tracker = layer_of(module, bits, points=(point,))
    executed = IntegerLayer(layer, tracker)
    grid, weight = executed.grid, executed.weights[0]
    for given in (x, x[:1]):
        for function in (weight.elsewhere, weight.in_floats):
            assert_close(function(grid.codes(given), grid), closed_form(layer, given))


def test_weights_far_from_zero_on_other_devices():
    torch.manual_seed(0)
    for module, x in ((nn.Conv2d(24, 20, 3, padding=1), random(3, 24, 8, 8)), (nn.Linear(24, 20), random(9, 24))):
        layer, tracker = layer_of(module)
        layer.weight_zero_point[::2], layer.weight_zero_point[1::4] = -300.0, 700.0
        executed = IntegerLayer(layer, tracker)
        assert_close(executed.weights[0].elsewhere(executed.grid.codes(x), executed.grid), closed_form(layer, x))


def test_sums_that_could_pass_what_floats_hold_are_taken_in_parts():
    codes, weight = torch.full((1, 3000), 255.0), torch.full((1, 3000), 127.0)
    sizes = part_sizes(weight.long(), 255)
    assert set(sizes[:-1]) == {2**24 // (255 * 127)} and sum(sizes) == 3000
    assert exact_parts(codes, weight, None, sizes, 255).item() == pytest.approx(255 * 127 * 3000, rel=2**-22)
    # Where large weights stand together, parts are small there: no sum of a part passes 2^24.
    weight = torch.cat([torch.ones(2, 2000), torch.full((2, 1000), 255.0)], 1)
    weight[1] = weight[0].flip(0)
    sizes = part_sizes(weight.long(), 255)
    assert all((part.sum(1) * 255).max() <= 2**24 for part in weight.split(sizes, 1))
    odd = torch.ones(1, 1, 3000)
    assert exact_bmm(255 * odd, 127 * odd.transpose(1, 2), 255, 255 * 127 * 3000.0).item() == pytest.approx(
        255 * 127 * 3000, rel=2**-22
    )


def attention_of(heads: int, dim: int, points: tuple[float, ...], bits: int = 8, symmetric: bool = False):
    torch.manual_seed(0)
    module = Attention(query_dim=heads * dim, heads=heads, dim_head=dim).eval().requires_grad_(False)
    tracker = StepTracker()
    tracker.steps = STEPS
    processor = QuantizedAttention(bits, bits, tracker, symmetric)
    for quantizer in (processor.query, processor.key, processor.value):
        set_grids(quantizer, [(3.0 + i) / (2**bits - 1) for i in range(len(points))], list(points))
    set_grids(processor.probabilities, [0.3 / (2**bits - 1)] * len(points), [0.0] * len(points))
    module.set_processor(processor)
    twin = copy.deepcopy(module)
    twin.set_processor(IntegerAttention(processor, tracker, []))
    return module, twin, tracker


@pytest.mark.parametrize("least_scores", [0, 10**9], ids=["in bytes", "in floats"])
@pytest.mark.parametrize("case", ["middle", "outside", "signed", "four bits", "rows", "cross", "mask", "image"])
def test_attention_products_are_those_of_simulation(case, least_scores, monkeypatch):
    monkeypatch.setattr("tfmq.modules.integer_attention.LEAST_SCORES", least_scores)
    for constant in ("SHARED_SCORES", "CACHED_SCORES", "CACHED_PROJECTIONS"):
        monkeypatch.setattr(f"tfmq.modules.integer_attention.{constant}", 400)
    points = {"outside": (-20.0,), "signed": (0.0,), "four bits": (7.0,), "rows": (100.0, 128.0, 141.0)}
    bits = 4 if case == "four bits" else 8
    module, twin, tracker = attention_of(2, 8, points.get(case, (121.0,)), bits, case == "signed")
    x = random(3, 30, 16) if case != "image" else random(3, 16, 5, 6)
    given = {}
    if case == "cross":
        given["encoder_hidden_states"] = random(3, 7, 16, seed=1)
    if case == "mask":
        given["attention_mask"] = torch.where(torch.arange(30) < 20, 0.0, -1e4).expand(3, 1, 30)
    tracker.set(STEPS[[2, 0, 1]] if case == "rows" else STEPS[0])
    expected, found = module(x, **given), twin(x, **given)
    # Probabilities are rounded after a softmax in floats: a tie that falls to the other side moves a code by one.
    far = (found - expected).abs() > 1e-5 * expected.abs().max()
    assert far.float().mean() < 0.01
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()


def test_attention_in_bytes_and_in_floats_are_the_same_sums():
    query, key, value = random(2, 40, 3, 8), random(2, 50, 3, 8, seed=1), random(2, 50, 3, 8, seed=2)
    grid = InputGrid(6 / 255, 119, 255)
    grids = (grid, grid, InputGrid(6 / 255, 140, 255), InputGrid(0.2 / 255, 0, 255))
    found = in_bytes(query, key, value, None, 0.35, grids), in_floats(query, key, value, None, 0.35, grids)
    close = torch.isclose(*found, rtol=1e-5, atol=1e-6)
    assert close.float().mean() > 0.99


@pytest.mark.parametrize("scale", [0.1, 0.35, 40.0], ids=["small", "usual", "exponentials underflow"])
def test_attention_of_any_scores_is_that_in_float64(scale):
    query, key, value = random(1, 40, 2, 8), random(1, 50, 2, 8, seed=1), random(1, 50, 2, 8, seed=2)
    grid, last = InputGrid(6 / 255, 119, 255), 255
    probabilities = InputGrid(1 / last, 0, last)
    q, k, v = ((grid.codes(x).double() - grid.zero_point).transpose(1, 2) * grid.scale for x in (query, key, value))
    codes = (torch.softmax(q @ k.transpose(2, 3) * scale, -1) * last).round()
    expected = (codes / last @ v).transpose(1, 2)
    for function in (in_bytes, in_floats):
        found = function(query, key, value, None, scale, (grid, grid, grid, probabilities))
        assert (~torch.isclose(found.double(), expected, rtol=1e-5, atol=1e-5)).float().mean() < 0.01


def test_codes_of_many_values_in_any_order_of_memory(monkeypatch):
    """Some at a time: of channels-last memory, a part of its channels, and other strides."""
    monkeypatch.setattr("tfmq.modules.integer_products.CACHED", 100)
    grid = InputGrid(0.03, 118, 255)
    x = random(3, 8, 5, 7)
    last = x.contiguous(memory_format=torch.channels_last)
    for given in (x, last, last[:, 2:7], x[:, 2:7], x.transpose(1, 2), x.flatten(2).transpose(1, 2), x[0, 0]):
        expected = (torch.round(given / grid.scale) + grid.zero_point).clamp(0, 255)
        assert torch.equal(grid.codes(given).float(), expected)
    assert grid.codes(last[:, 2:7]).is_contiguous(memory_format=torch.channels_last)


def test_layers_depend_on_neither_batch_nor_threads():
    torch.manual_seed(0)
    modules = (
        (nn.Conv2d(32, 48, 3, padding=1), random(64, 32, 8, 8)),
        (nn.Linear(32, 48), random(64, 16, 32)),
        (nn.Linear(64, 64), random(64, 64)),
    )
    for module, x in modules:
        layer, tracker = layer_of(module)
        executed = IntegerLayer(layer, tracker)
        whole = executed(x)
        for rows in (1, 3, 16):
            assert torch.equal(torch.cat([executed(part) for part in x.split(rows)]), whole)
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(2)
            assert torch.equal(executed(x), whole)
        finally:
            torch.set_num_threads(threads)


def test_a_weight_is_packed_for_a_few_shapes():
    for window, kept, shape in ((None, 1, ()), (Window((1, 1), (1, 1), (0, 0), (1, 1)), 4, (1, 1))):
        weight = IntegerWeight(
            torch.zeros(8, 8, *shape, dtype=torch.uint8), torch.ones(8), torch.zeros(8), None, window
        )
        for rows in range(1, 20):
            weight(torch.zeros(rows, 8, *shape, dtype=torch.uint8), InputGrid(1.0, 0, 255))
        assert isinstance(weight.packed, Packed) and len(weight.packed.packed) == kept
