import io

import numpy as np
import pytest
import torch
import torch_fidelity
from safetensors.torch import save_file
from torch.utils.data import Dataset
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from benchmarks.features import extract, load_evaluator
from benchmarks.features.inception import load
from benchmarks.metrics._frechet import frechet_distance, moments
from benchmarks.metrics.is_score import inception_score
from benchmarks.metrics.kid_fp import kernel_distances


class Untrained(FeatureExtractorInceptionV3):
    """torch-fidelity's network as it is before it reads its weights."""

    def load_state_dict(self, state_dict):
        pass


class Images(Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


def images(count, seed):
    # Of different brightness, contrast and grain, or an untrained network could not tell them apart.
    generator = torch.Generator().manual_seed(seed)
    levels = torch.rand(count, 3, 4, 4, generator=generator) * torch.rand(count, 3, 1, 1, generator=generator)
    noise = torch.rand(count, 3, 32, 32, generator=generator) * torch.rand(count, 1, 1, 1, generator=generator)
    return (levels.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3) * 128 + noise * 127).to(torch.uint8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    network = Untrained("untrained", ["2048"], feature_extractor_weights_path=empty)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            # Keeps the signal's size through the ReLUs, as trained weights do.
            torch.nn.init.kaiming_normal_(module.weight)
    torch.nn.init.normal_(network.fc.weight)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path


def test_distances_equal_those_of_torch_fidelity(weights):
    a, b = images(4, seed=0), images(4, seed=1)
    expected = torch_fidelity.calculate_metrics(
        input1=Images(a),
        input2=Images(b),
        fid=True,
        isc=True,
        kid=True,
        isc_splits=2,
        kid_subsets=1,
        kid_subset_size=4,
        samples_shuffle=False,
        feature_extractor_weights_path=str(weights),
        cuda=False,
        save_cpu_ram=True,
        cache=False,
        verbose=False,
    )
    measured = load_evaluator("inception", weights)
    first, second = extract(measured, a), extract(measured, b)
    assert [tuple(tensor.shape) for tensor in vars(first).values()] == [(4, 2048), (4, 2023), (4, 1008)]
    fid = frechet_distance(first.pooled, moments(second.pooled))
    score = inception_score(first.logits, splits=2)
    kid = kernel_distances(first.pooled, second.pooled, torch.ones(1, 4, dtype=torch.float64)).item()
    assert score > 1.001
    assert fid == pytest.approx(expected["frechet_inception_distance"], rel=1e-3)
    assert score == pytest.approx(expected["inception_score_mean"], rel=1e-4)
    assert kid == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-3)


def test_spatial_features_are_the_first_channels_with_channels_last(weights):
    network = load(weights).eval()
    seen = []
    handle = network.network.Mixed_6d.branch1x1.register_forward_hook(lambda layer, inputs, output: seen.append(output))
    with torch.inference_mode():
        features, maps = network(images(1, seed=2))
    handle.remove()
    expected = np.transpose(seen[0].numpy()[:, :7], (0, 2, 3, 1)).reshape(1, -1)
    assert np.array_equal(features.spatial.numpy(), expected)
    assert features.spatial.min() == 0  # After the ReLU
    assert [tuple(part.shape[1:]) for part in maps] == [(64, 73, 73), (192, 35, 35), (768, 17, 17), (2048, 8, 8)]


def test_safetensors_weights_give_the_same_features(weights, tmp_path):
    save_file(torch.load(weights, weights_only=True), tmp_path / "inception.safetensors")
    with torch.inference_mode():
        expected, _ = load(weights).eval()(images(1, seed=3))
        features, _ = load(tmp_path / "inception.safetensors").eval()(images(1, seed=3))
    assert torch.equal(features.pooled, expected.pooled)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    save_file({"fc.bias": torch.zeros(1000)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="does not hold the weights of the FID Inception network"):
        load(tmp_path / "other.safetensors")


def test_pickled_code_is_not_run(tmp_path):
    class Canary:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"fc.bias": Canary()}, tmp_path / "weights.pth")
    with pytest.raises(Exception, match="weights_only|Weights only"):
        load(tmp_path / "weights.pth")
    assert not (tmp_path / "ran").exists()
