"""KID to the data is torch-fidelity's, and its interval holds what it is about."""

import pytest
import torch
from torch_fidelity.metric_kid import kid_features_to_metric

from benchmarks.features import Features
from benchmarks.metrics import Evidence, Moments, References, ReferenceStatistics, kid_data
from benchmarks.metrics.kid_data import METRIC


def features(count, seed, shift=0.0):
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(seed)) + shift


def value(pooled, data):
    nothing = ReferenceStatistics(Moments(torch.zeros(16), torch.eye(16), 2), None)
    seen = Features(pooled, torch.zeros(len(pooled), 1), torch.zeros(len(pooled), 1))
    return METRIC.compute(Evidence(seen, References(nothing, data_pooled=data)), torch.Generator())


@pytest.mark.parametrize(("count", "data_count", "size"), [(60, 80, 30), (60, 20, 20), (2100, 1500, 1000)])
def test_equals_torch_fidelity(count, data_count, size, monkeypatch):
    monkeypatch.setattr(kid_data, "SUBSETS", 5)
    a, b = features(count, 0), features(data_count, 1, shift=0.3)
    expected = kid_features_to_metric(a, b, kid_subsets=5, kid_subset_size=size, verbose=False)
    found = value(a, b)
    assert found.value == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-4) and found.n == count


def test_the_interval_holds_what_the_images_are_drawn_from():
    data = features(400, 1, shift=0.3)
    expected = kid_features_to_metric(features(20_000, 2).double(), data.double(), kid_subset_size=400, verbose=False)
    values = [value(features(100, seed), data) for seed in range(3, 43)]
    covered = [found.low <= expected["kernel_inception_distance_mean"] <= found.high for found in values]
    assert sum(covered) >= 36
    scatter = torch.tensor([found.value for found in values]).std().item()
    widths = torch.tensor([found.high - found.low for found in values]) / (2 * 1.96)
    assert 0.75 * scatter < widths.mean().item() < 2.5 * scatter
