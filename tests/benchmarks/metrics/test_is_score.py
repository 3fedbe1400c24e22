import pytest
import torch
from torch_fidelity.metric_isc import isc_features_to_metric

from benchmarks.metrics.is_score import _scores, inception_score


@pytest.mark.parametrize("splits", [1, 3, 10])
def test_equals_torch_fidelity(splits):
    logits = 3 * torch.randn(101, 20, generator=torch.Generator().manual_seed(0))
    expected = isc_features_to_metric(logits, splits=splits, shuffle=False)["inception_score_mean"]
    assert inception_score(logits, splits) == pytest.approx(expected, rel=1e-9)


def test_certain_and_even_classes_score_their_number():
    logits = 1000 * torch.eye(4).repeat(5, 1)
    assert inception_score(logits, 1) == pytest.approx(4)


def test_equal_images_score_one():
    assert inception_score(torch.randn(1, 9).expand(6, 9), 1) == pytest.approx(1)


def test_a_mask_is_the_subset():
    logits = 3 * torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    masks = torch.ones(2, 20, dtype=torch.float64)
    masks[1, [3, 15, 16]] = 0
    scores = _scores(logits, masks, splits=2)
    kept = masks[1].bool()
    expected = (inception_score(logits[:10][kept[:10]], 1) + inception_score(logits[10:][kept[10:]], 1)) / 2
    assert scores[1].item() == pytest.approx(expected)
