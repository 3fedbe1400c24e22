"""The intervals must hold the value that they are about: the metric's expected value at this number of images."""

import pytest
import torch

from benchmarks.metrics._frechet import frechet_with_interval, moments
from benchmarks.metrics._interval import kept_images, left_out, mean_with_interval, with_interval
from benchmarks.metrics.is_score import _scores
from benchmarks.metrics.kid_fp import kernel_distances

TRIALS = 80


def masks(count, generator):
    return torch.cat([torch.ones(1, count).double(), kept_images(count, 300, generator)])


def check(values, expected):
    # 0.95 less four standard errors of a share among 80 trials.
    assert sum(value.low <= expected <= value.high for value in values) / len(values) >= 0.85
    # Not by being wide: the standard error is about as large as the estimates scatter.
    scatter = torch.tensor([value.value for value in values]).std().item()
    widths = torch.tensor([value.high - value.low for value in values]) / (2 * 1.96)
    assert 0.75 * scatter < widths.mean().item() < 1.6 * scatter


def mean(values):
    return sum(value.value for value in values) / len(values)


@pytest.mark.parametrize("count", [3, 10, 57])
def test_a_tenth_is_left_out(count):
    kept = kept_images(count, 200, torch.Generator().manual_seed(0))
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    assert (kept.sum(dim=1) == count - left_out(count)).all()
    assert left_out(count) == {3: 1, 10: 1, 57: 5}[count]
    # Every image is left out equally often.
    assert kept.mean(dim=0).sub(1 - left_out(count) / count).abs().max() < 0.15


def test_same_generator_gives_the_same_interval():
    values = torch.rand(30, generator=torch.Generator().manual_seed(0))
    a, b = (mean_with_interval(values, torch.Generator().manual_seed(7)) for _ in range(2))
    assert a == b


def test_mean():
    generator = torch.Generator().manual_seed(0)
    values = [mean_with_interval(torch.empty(60).exponential_(1.0, generator=generator), generator) for _ in range(200)]
    check(values, expected=1.0)
    assert all(value.n == 60 for value in values)


def test_mean_has_the_textbook_standard_error():
    values = torch.randn(90, generator=torch.Generator().manual_seed(0))
    value = mean_with_interval(values, torch.Generator().manual_seed(1))
    assert (value.high - value.low) / (2 * 1.96) == pytest.approx(values.std().item() / 90**0.5, rel=0.08)


def test_constant_values_have_no_width():
    value = mean_with_interval(torch.full((20,), 0.5), torch.Generator().manual_seed(0))
    assert (value.value, value.low, value.high) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(("count", "width"), [(60, 8), (20, 40)])  # More images than columns, and fewer
def test_frechet_distance(count, width):
    generator = torch.Generator().manual_seed(count)
    reference = moments(torch.randn(500, width, generator=generator) + 0.5)
    scale = torch.linspace(0.3, 1.5, width)
    values = [
        frechet_with_interval(torch.randn(count, width, generator=generator) * scale, reference, generator)
        for _ in range(TRIALS)
    ]
    check(values, mean(values))


@pytest.mark.parametrize(("shift", "width"), [(0.0, 6), (0.3, 6), (0.1, 100)])
def test_kernel_distance(shift, width):
    generator = torch.Generator().manual_seed(3)
    reference = torch.randn(300, width, generator=generator)
    values = []
    for _ in range(TRIALS):
        features = torch.randn(60, width, generator=generator) + shift
        distances = kernel_distances(features, reference, masks(60, generator))
        values.append(with_interval(distances[0].item(), distances[1:], 60))
    check(values, mean(values))


@pytest.mark.parametrize("classes", [10, 200])
def test_inception_score(classes):
    generator = torch.Generator().manual_seed(4)
    values = []
    for _ in range(TRIALS):
        scores = _scores(3 * torch.randn(80, classes, generator=generator), masks(80, generator), splits=1)
        values.append(with_interval(scores[0].item(), scores[1:], 80))
    check(values, mean(values))
