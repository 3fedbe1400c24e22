"""Precision and recall are torch-fidelity's."""

import pytest
import torch
from torch_fidelity.metric_prc import prc_features_to_metric

from benchmarks.metrics import _manifold
from benchmarks.metrics._manifold import inside


def features(count, seed, shift=0.0):
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed)) + shift


@pytest.mark.parametrize("rows", [1000, 7])
def test_equals_torch_fidelity(rows, monkeypatch):
    monkeypatch.setattr(_manifold, "ROWS", rows)
    images, data = features(60, 0), features(90, 1, shift=1.2)
    expected = prc_features_to_metric(images, data, verbose=False)
    assert len({expected["precision"], expected["recall"], 0, 1}) == 4
    assert inside(images, data).mean().item() == pytest.approx(expected["precision"])
    assert inside(data, images).mean().item() == pytest.approx(expected["recall"])


def test_a_ball_reaches_to_the_third_nearest_neighbour():
    centres = torch.tensor([[0.0], [1.0], [2.0], [3.0], [100.0]])  # radii 3, 2, 2, 3 and 99
    points = torch.tensor([[-2.9], [-3.1], [0.9], [198.0], [200.0]])
    assert inside(points, centres).tolist() == [1, 0, 1, 1, 0]


def test_of_few_centres_a_ball_reaches_to_the_furthest():
    assert inside(torch.tensor([[-3.9], [8.1]]), torch.tensor([[0.0], [4.0]])).tolist() == [1, 0]
    with pytest.raises(ValueError, match="two or more images; got 1"):
        inside(torch.zeros(2, 1), torch.zeros(1, 1))
