"""The FID Inception evaluators against torch-fidelity and clean-fid, with random weights of the right shapes."""

import numpy as np
import pytest
import torch
import torch_fidelity
from cleanfid import fid as cleanfid
from cleanfid import inception_pytorch
from cleanfid.inception_torchscript import InceptionV3W
from cleanfid.resize import build_resizer
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import Dataset

from benchmarks.features import extract, extract_with_maps, extractor, load_evaluator
from benchmarks.features.inception import load
from benchmarks.features.inception_clean import resize_clean
from benchmarks.metrics import Evidence, References, metrics, reference_statistics
from benchmarks.metrics._frechet import frechet_distance, moments
from benchmarks.metrics.is_score import inception_score
from tests.benchmarks.inception import write_weights

COUNT = 8


class Images(Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


def images(count, seed, size=32):
    # Of different brightness, contrast and grain, or an untrained network could not tell them apart.
    generator = torch.Generator().manual_seed(seed)
    levels = torch.rand(count, 3, 4, 4, generator=generator) * torch.rand(count, 3, 1, 1, generator=generator)
    noise = torch.rand(count, 3, size, size, generator=generator) * torch.rand(count, 1, 1, 1, generator=generator)
    levels = torch.nn.functional.interpolate(levels, size=(size, size))
    return (levels * 128 + noise * 127).to(torch.uint8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    write_weights(path)
    return path


@pytest.fixture(scope="module")
def measured(weights):
    return load_evaluator("inception", weights)


def test_scores_equal_those_of_torch_fidelity(weights, measured):
    a, b = images(COUNT, seed=0), images(COUNT, seed=1)
    expected = torch_fidelity.calculate_metrics(
        input1=Images(a),
        input2=Images(b),
        fid=True,
        isc=True,
        kid=True,
        prc=True,
        feature_extractor="inception-v3-compat",
        isc_splits=2,
        kid_subset_size=COUNT // 2,
        samples_shuffle=False,
        feature_extractor_weights_path=str(weights),
        cuda=False,
        cache=False,
        verbose=False,
    )
    first, second = extract(measured, a), extract(measured, b)
    assert [tuple(tensor.shape) for tensor in vars(first).values()] == [(COUNT, 2048), (COUNT, 2023), (COUNT, 1008)]
    evidence = Evidence(first, References(reference_statistics(second), data_pooled=second.pooled))
    found = {name: metric.compute(evidence, torch.Generator()) for name, metric in metrics().items()}
    score = inception_score(first.logits, splits=2)
    assert score > 1.001
    assert score == pytest.approx(expected["inception_score_mean"], rel=1e-4)
    assert found["fd_data"].value == pytest.approx(expected["frechet_inception_distance"], rel=1e-3)
    assert found["kid_data"].value == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-3)
    assert found["precision_data"].value == pytest.approx(expected["precision"])
    assert found["recall_data"].value == pytest.approx(expected["recall"])


def test_clean_features_and_distance_equal_those_of_clean_fid(weights, measured, tmp_path, monkeypatch):
    # clean-fid's own copy of the network, as the TorchScript file that it expects.
    state = torch.load(weights, weights_only=True)
    monkeypatch.setattr(inception_pytorch, "load_state_dict_from_url", lambda url, progress: state)
    blocks = inception_pytorch.InceptionV3([3], resize_input=False).eval().blocks

    class Base(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.Sequential(*blocks)

        def forward(self, pixels):
            return self.layers(pixels)

    torch.jit.trace(Base().eval(), torch.zeros(1, 3, 299, 299)).save(str(tmp_path / "inception-2015-12-05.pt"))
    network = InceptionV3W(str(tmp_path), download=False)
    ours, theirs, count = [], [], 4
    clean = load_evaluator("inception_clean", weights)
    for seed in (0, 1):
        pixels = images(count, seed, size=48)
        ours.append(extract(clean, pixels).pooled)
        paths = [str(tmp_path / f"{seed}-{index}.png") for index in range(count)]
        for image, path in zip(pixels, paths, strict=True):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
        theirs.append(
            cleanfid.get_files_features(paths, network, num_workers=0, device=torch.device("cpu"), verbose=False)
        )
        torch.testing.assert_close(ours[-1], torch.from_numpy(theirs[-1]), rtol=1e-3, atol=1e-4)
    # On some of the features, since clean-fid takes half a minute for the root of a matrix of all of them.
    expected = cleanfid.fid_from_feats(*(features[:, :100] for features in theirs))
    assert frechet_distance(ours[0][:, :100], moments(ours[1][:, :100])) == pytest.approx(expected, rel=1e-3)
    # The resize matters.
    other = extract(measured, images(1, 0, size=48)).pooled
    assert (ours[0][:1] - other).abs().max() > 10 * (ours[0] - torch.from_numpy(theirs[0])).abs().max()


@pytest.mark.parametrize("size", [32, 256, 299, 512])
def test_the_clean_resize_is_clean_fids(size):
    pixels = images(2, seed=4, size=size)
    resizer = build_resizer("clean")
    for image, resized in zip(pixels, resize_clean(pixels), strict=True):
        expected = resizer(image.permute(1, 2, 0).numpy()).transpose(2, 0, 1)
        assert np.abs(resized.numpy() - expected).max() < 1e-4


def test_spatial_features_are_the_first_channels_with_channels_last(measured):
    network, seen = measured.network, []
    handle = network.network.Mixed_6d.branch1x1.register_forward_hook(lambda layer, inputs, output: seen.append(output))
    with torch.inference_mode():
        features, maps = network(images(1, seed=2))
    handle.remove()
    expected = np.transpose(seen[0].numpy()[:, :7], (0, 2, 3, 1)).reshape(1, -1)
    assert expected.shape == (1, 2023) and np.array_equal(features.spatial.numpy(), expected)
    assert features.spatial.min() == 0  # After the ReLU
    assert [tuple(part.shape[1:]) for part in maps] == [(64, 73, 73), (192, 35, 35), (768, 17, 17), (2048, 8, 8)]


def test_maps_are_too_large_to_be_kept(measured):
    _, maps = extract_with_maps(measured, images(1, seed=2))
    assert 1.8e6 < sum(layer.numel() * layer.element_size() for layer in maps) < 2e6
    assert not extractor("inception").keeps_maps and extractor("efficientnet_lite0").keeps_maps


def test_safetensors_weights_give_the_same_features(weights, measured, tmp_path):
    save_file(torch.load(weights, weights_only=True), tmp_path / "inception.safetensors")
    with torch.inference_mode():
        expected, _ = measured.network(images(1, seed=3))
        features, _ = load(tmp_path / "inception.safetensors").eval()(images(1, seed=3))
    assert torch.equal(features.pooled, expected.pooled)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    save_file({"fc.bias": torch.zeros(1000)}, tmp_path / "other.safetensors")
    (tmp_path / "short.safetensors").write_bytes((tmp_path / "other.safetensors").read_bytes()[:-5])
    (tmp_path / "page.pth").write_text("<html>not found</html>")
    for name in ("other.safetensors", "short.safetensors", "page.pth"):
        with pytest.raises(ValueError, match="does not hold the weights of the FID Inception network") as error:
            load(tmp_path / name)
        assert "\n" not in str(error.value)


def test_pickled_code_is_not_run(tmp_path):
    class Canary:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"fc.bias": Canary()}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="weights_only|Weights only"):
        load(tmp_path / "weights.pth")
    assert not (tmp_path / "ran").exists()
