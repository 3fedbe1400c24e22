import pytest
import torch
from torch import nn

from tests.tfmq.oracle import each, tensors
from tfmq.modules.fake_quantize import StepTracker
from tfmq.modules.layers import quantized_layer
from tfmq.numerics.observer import search
from tfmq.plan import activation_quantizers

CASE = "06_split_shortcut"
SETTING = r"(?P<layer>\w+)\.w(?P<w>\d+)a(?P<a>\d+)"


def convolution(match):
    """The recorded convolution."""
    weight, bias = tensors(CASE)[f"{match['layer']}.w"], tensors(CASE)[f"{match['layer']}.bias"]
    padding = tuple(side // 2 for side in weight.shape[2:])
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2:], padding=padding)
    conv.weight.data, conv.bias.data = weight.clone(), bias.clone()
    return conv.requires_grad_(False)


def split_layer(match):
    """Its quantised twin, weights ranged by search and not rounded yet, activation ranges as recorded."""
    values = tensors(CASE)
    prefix = match[0][: match.end("a")]
    splits = tuple(values[f"{prefix}.alpha{part}"].shape[1] for part in range(2))
    layer = quantized_layer(convolution(match), int(match["w"]), int(match["a"]), StepTracker(), splits)
    layer.find_weight_range("search")
    for part, quantizer in enumerate(layer.input_quantizer.parts):
        quantizer.scale = values[f"{prefix}.act{part}.delta"].reshape(1)
        quantizer.zero_point = values[f"{prefix}.act{part}.zero_point"].reshape(1)
        quantizer.enabled = True
    return layer, prefix


def assert_output_close(found, name):
    expected = tensors(CASE)[name]
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@each(CASE, SETTING + r"\.tfmq\.y")
def test_each_split_has_its_published_range(match):
    layer, prefix = split_layer(match)
    values = tensors(CASE)
    for part, x in enumerate(values["x"].split(layer.splits, 1)):
        scale = values[f"{prefix}.w{part}.delta"].reshape(-1)
        torch.testing.assert_close(layer.weight_scale[:, part], scale, rtol=1e-6, atol=0)
        assert torch.equal(layer.weight_zero_point[:, part], values[f"{prefix}.w{part}.zero_point"].reshape(-1))
        scale, zero_point = search(x.reshape(1, -1), int(match["a"]))
        torch.testing.assert_close(scale[0], values[f"{prefix}.act{part}.delta"], rtol=1e-6, atol=0)
        assert zero_point[0] == values[f"{prefix}.act{part}.zero_point"]


@each(CASE, SETTING + r"\.(?:tfmq|qdiff)\.y")
def test_split_layer_equals_the_published_one(match):
    layer, _ = split_layer(match)
    layer.fold()
    assert_output_close(layer(tensors(CASE)["x"]), match[0])


@each(CASE, SETTING + r"\.tfmq\.y_weight_only")
def test_split_layer_without_activations_equals_the_published_one(match):
    layer, _ = split_layer(match)
    layer.fold()
    for quantizer in activation_quantizers(layer).values():
        quantizer.enabled = False
    assert_output_close(layer(tensors(CASE)["x"]), match[0])


@each(CASE, SETTING + r"\.tfmq\.y_unsplit")
def test_unsplit_twin_equals_the_published_one(match):
    x = tensors(CASE)["x"]
    layer = quantized_layer(convolution(match), int(match["w"]), int(match["a"]), StepTracker())
    layer.find_weight_range("search")
    layer.fold()
    quantizer = layer.input_quantizer
    quantizer.scale, quantizer.zero_point = search(x.reshape(1, -1), int(match["a"]))
    quantizer.enabled = True
    assert_output_close(layer(x), match[0])


@each(CASE, SETTING + r"\.tfmq\.y_(?P<rounding>soft|hard)")
def test_learned_rounding_of_a_split_layer_equals_the_published_one(match):
    layer, prefix = split_layer(match)
    values = tensors(CASE)
    rounding = layer.learn_rounding()
    rounding.alpha.data = torch.cat([values[f"{prefix}.alpha{part}"] for part in range(2)], 1)
    if match["rounding"] == "hard":
        layer.fold()
    with torch.no_grad():
        assert_output_close(layer(values["x"]), match[0])


# -- layers in general ------------------------------------------------------------------------------------------------

LAYERS = {
    "conv": lambda: nn.Conv2d(6, 4, 3, stride=2, padding=1),
    "conv-grouped": lambda: nn.Conv2d(6, 4, 3, padding=2, dilation=2, groups=2, bias=False),
    "linear": lambda: nn.Linear(6, 4),
    "linear-no-bias": lambda: nn.Linear(6, 4, bias=False),
}


def full_layer(name):
    torch.manual_seed(0)
    layer = LAYERS[name]().requires_grad_(False)
    x = torch.randn(2, 6, 8, 8) if name.startswith("conv") else torch.randn(5, 6)
    return layer, x


@pytest.mark.parametrize("name", LAYERS)
def test_twin_computes_the_layer_until_it_is_folded(name):
    layer, x = full_layer(name)
    twin = quantized_layer(layer, 4, 8, StepTracker())
    assert torch.equal(twin(x), layer(x))
    assert twin.weight is layer.weight


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("method", ["minmax", "search"])
def test_folded_weight_is_its_codes_on_the_grid(name, method):
    layer, x = full_layer(name)
    twin = quantized_layer(layer, 3, 32, StepTracker())
    twin.find_weight_range(method)
    twin.fold()
    assert twin.codes.dtype == torch.uint8 and twin.codes.max() <= 7 and twin.codes.shape == layer.weight.shape
    scale, zero_point = (v.view(-1, *[1] * (x.dim() - 1)) for v in (twin.weight_scale, twin.weight_zero_point))
    torch.testing.assert_close(twin.weight.detach(), (twin.codes - zero_point) * scale)
    assert (twin.weight - layer.weight).abs().max() > 0
    layer.weight = twin.weight
    assert torch.equal(twin(x), layer(x))


@pytest.mark.parametrize("name", LAYERS)
def test_eight_bits_are_close_and_fewer_are_worse(name):
    layer, x = full_layer(name)
    errors = []
    for bits in (8, 4, 2):
        twin = quantized_layer(layer, bits, bits, StepTracker())
        twin.find_weight_range("search")
        twin.fold()
        for quantizer in activation_quantizers(twin).values():
            quantizer.observe()
        twin(x)
        for quantizer in activation_quantizers(twin).values():
            quantizer.freeze()
        errors.append(((twin(x) - layer(x)).norm() / layer(x).norm()).item())
    assert errors[0] < 0.02 and errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize("name", LAYERS)
def test_learned_rounding_starts_at_the_layer_and_folds_to_nearest(name):
    layer, x = full_layer(name)
    twin, nearest = (quantized_layer(layer, 4, 32, StepTracker()) for _ in range(2))
    for quantized in (twin, nearest):
        quantized.find_weight_range("minmax")
    rounding = twin.learn_rounding()
    # The zero point is rounded, so that the ends of the grid may cut up to half a step off the extreme weights.
    ends = [(end - rounding.zero_point) * rounding.scale for end in rounding.grid]
    start = layer.weight.maximum(ends[0]).minimum(ends[1])
    torch.testing.assert_close(twin.effective_weight().detach(), start, rtol=1e-5, atol=1e-6)
    assert not torch.equal(start, twin.weight) and twin(x).requires_grad
    twin.fold()
    nearest.fold()
    assert twin.rounding is None and torch.equal(twin.codes, nearest.codes)
