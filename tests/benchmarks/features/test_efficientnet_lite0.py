from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from timm.models import create_model

from benchmarks.features import extract, load_evaluator, resize
from benchmarks.features.efficientnet_lite0 import load, weight_name

WEIGHTS = Path(__file__).parents[3] / "data" / "efficientnet-lite0" / "model.safetensors"


def images(count):
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    network = create_model("tf_efficientnet_lite0", pretrained=False).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.5)
    return network


@pytest.fixture(scope="module")
def weights(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file({weight_name(name): tensor for name, tensor in network.state_dict().items()}, path)
    return path


def test_features_are_those_of_the_network(network, weights):
    measured = load_evaluator("efficientnet_lite0", weights)
    features = extract(measured, images(5))
    with torch.inference_mode():
        x = (resize(images(5), 224) - 127) / 128
        expansion = network.blocks[4][0]
        spatial = expansion.bn1(expansion.conv_pw(network.blocks[:4](network.bn1(network.conv_stem(x)))))[:, :10]
        pooled = network.forward_head(network.forward_features(x), pre_logits=True)
        logits = network(x)
    assert [tuple(tensor.shape) for tensor in vars(features).values()] == [(5, 1280), (5, 1960), (5, 1000)]
    torch.testing.assert_close(features.pooled, pooled, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(features.logits, logits, rtol=1e-3, atol=1e-4)
    assert features.spatial.min() >= 0 and features.spatial.max() <= 6  # After the ReLU6
    # Channels last: the ten channels of the first position come first.
    torch.testing.assert_close(features.spatial[:, :10], spatial[:, :, 0, 0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(features.spatial[:, 10:20], spatial[:, :, 0, 1], rtol=1e-3, atol=1e-4)


def test_maps_are_one_per_resolution(weights):
    with torch.inference_mode():
        _, maps = load(weights).eval()(images(1))
    assert [tuple(part.shape[1:]) for part in maps] == [
        (16, 112, 112),
        (24, 56, 56),
        (40, 28, 28),
        (112, 14, 14),
        (320, 7, 7),
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("conv_stem.weight", "_conv_stem.weight"),
        ("bn1.running_var", "_bn0.running_var"),
        ("blocks.0.0.conv_dw.weight", "_blocks.0._depthwise_conv.weight"),
        ("blocks.0.0.conv_pw.weight", "_blocks.0._project_conv.weight"),
        ("blocks.1.0.conv_pw.weight", "_blocks.1._expand_conv.weight"),
        ("blocks.4.2.bn2.bias", "_blocks.10._bn1.bias"),
        ("blocks.6.0.bn3.bias", "_blocks.15._bn2.bias"),
        ("conv_head.weight", "_conv_head.weight"),
        ("bn2.weight", "_bn1.weight"),
        ("classifier.bias", "_fc.bias"),
    ],
)
def test_names_of_the_weights_package(name, expected):
    assert weight_name(name) == expected


def test_half_precision_weights_are_computed_in_single(network, tmp_path):
    state = {weight_name(name): tensor for name, tensor in network.state_dict().items()}
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    save_file(half, tmp_path / "model.safetensors")
    assert extract(load_evaluator("efficientnet_lite0", tmp_path / "model.safetensors"), images(1)).pooled.dtype == (
        torch.float32
    )


def test_weights_that_do_not_fit_are_named(network, tmp_path):
    state = {weight_name(name): tensor for name, tensor in network.state_dict().items()}
    del state["_fc.bias"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 tensors .*'_fc.bias'"):
        load(tmp_path / "model.safetensors")


@pytest.mark.skipif(not WEIGHTS.exists(), reason="the evaluator's weights are not here: run `dvc pull data`")
def test_trained_weights_fit_and_see_colour_and_shape():
    measured = load_evaluator("efficientnet_lite0", WEIGHTS)
    rows, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    # A yellow disc on white, twice with one grey level between them, and noise.
    disc = torch.full((3, 32, 32), 255, dtype=torch.uint8)
    disc[2, (rows - 16) ** 2 + (columns - 16) ** 2 < 144] = 40
    nearly = disc.clone()
    nearly[2, 16, 16] += 1
    features = extract(measured, torch.stack([disc, nearly, images(1)[0]])).pooled
    same, other = torch.nn.functional.cosine_similarity(features[:1], features[1:])
    assert same > 0.999
    assert other < 0.7
