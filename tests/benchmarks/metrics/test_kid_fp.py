import numpy as np
import pytest
import torch
from torch_fidelity.metric_kid import kernel_mmd, kid_features_to_metric

from benchmarks.metrics import kid_fp
from benchmarks.metrics.kid_fp import kernel_distances


def features(count, seed, shift=0.0):
    return torch.randn(count, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + shift


def ones(count):
    return torch.ones(1, count, dtype=torch.float64)


def test_equals_torch_fidelity():
    a, b = features(40, 0), features(40, 1, shift=0.5)
    expected = kid_features_to_metric(a, b, kid_subsets=1, kid_subset_size=40, verbose=False)
    ours = kernel_distances(a, b, ones(40)).item()
    assert ours == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-9)


def test_is_what_torch_fidelitys_subsets_average_to():
    a, b = features(60, 0), features(80, 1, shift=0.3)
    expected = kid_features_to_metric(a, b, kid_subsets=1000, kid_subset_size=30, verbose=False)
    ours = kernel_distances(a, b, ones(60)).item()
    error = expected["kernel_inception_distance_std"] / 1000**0.5
    assert abs(ours - expected["kernel_inception_distance_mean"]) < 4 * error


def test_a_mask_is_the_subset():
    a, b = features(6, 0), features(9, 1)
    mask = torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.0, 1.0]], dtype=torch.float64)
    both = kernel_distances(a, b, torch.cat([ones(6), mask]))
    assert both[0].item() == pytest.approx(kernel_distances(a, b, ones(6)).item())
    assert both[1].item() == pytest.approx(kernel_distances(a[mask[0].bool()], b, ones(4)).item())


def test_a_matrix_cut_into_blocks_is_the_same_matrix(monkeypatch):
    a, b = features(11, 0), features(9, 1)
    masks = torch.cat([ones(11), (torch.rand(3, 11, generator=torch.Generator().manual_seed(0)) < 0.8).double()])
    expected = kernel_distances(a, b, masks)
    for entries in (1, 40, 100):
        monkeypatch.setattr(kid_fp, "ENTRIES", entries)
        torch.testing.assert_close(kernel_distances(a, b, masks), expected, rtol=1e-12, atol=1e-14)


def test_is_unbiased():
    reference = features(50, 99)
    values = [kernel_distances(features(10, seed), reference, ones(10)).item() for seed in range(400)]
    large = kernel_distances(features(4000, 12345), reference, ones(4000)).item()
    assert np.mean(values) == pytest.approx(large, abs=4 * np.std(values) / 20)


def test_identical_sets_lie_just_below_zero():
    a = features(30, 0)
    assert kernel_distances(a, a, ones(30)).item() < 0
    assert kernel_distances(a, a, ones(30)).item() == pytest.approx(kernel_mmd(a.numpy(), a.numpy()))
