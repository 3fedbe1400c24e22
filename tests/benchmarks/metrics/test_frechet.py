import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from benchmarks.metrics._frechet import Moments, _distances, frechet_distance, moments


def gaussian(count, mean, covariance, seed=0):
    """Samples whose own mean and covariance are exactly these."""
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randn(count, len(mean), dtype=torch.float64, generator=generator)
    samples = samples - samples.mean(dim=0)
    whitened = samples @ torch.linalg.inv(torch.linalg.cholesky(samples.T @ samples / (count - 1))).T
    return whitened @ torch.linalg.cholesky(covariance).T + mean


def scipy_distance(a, b):
    root = sqrtm(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False)).real
    shift = a.mean(0) - b.mean(0)
    return shift @ shift + np.trace(np.cov(a, rowvar=False) + np.cov(b, rowvar=False) - 2 * root)


def test_diagonal_gaussians_in_closed_form():
    variances, reference = torch.tensor([4.0, 9.0, 1.0]).double(), torch.tensor([1.0, 1.0, 25.0]).double()
    mean = torch.tensor([1.0, -2.0, 0.5]).double()
    samples = gaussian(50, mean, variances.diag())
    distance = frechet_distance(samples, Moments(torch.zeros(3).double(), reference.diag(), 10))
    # |m|^2 + sum of (s1 - s2)^2
    assert distance == pytest.approx(5.25 + 1 + 4 + 16, rel=1e-9)


@pytest.mark.parametrize("count", [8, 40, 200])
def test_equals_scipy(count):
    # 40 columns: fewer images than columns, as many, and more.
    generator = torch.Generator().manual_seed(count)
    a = torch.randn(count, 40, generator=generator) @ torch.randn(40, 40, generator=generator)
    b = torch.rand(300, 40, generator=generator) * 3
    expected = scipy_distance(a.double().numpy(), b.double().numpy())
    assert frechet_distance(a, moments(b)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("width", [8, 60])
def test_subsets_are_what_the_images_alone_give(width):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(30, width, generator=generator)
    reference = moments(torch.rand(50, width, generator=generator))
    mask = torch.rand(30, generator=generator) < 0.8
    both = _distances(features, reference, torch.stack([torch.ones(30), mask]).double())
    assert both[0].item() == pytest.approx(frechet_distance(features, reference))
    assert both[1].item() == pytest.approx(frechet_distance(features[mask], reference))


@pytest.mark.parametrize("count", [10, 100])
def test_identical_sets_are_at_distance_zero(count):
    features = torch.randn(count, 30, generator=torch.Generator().manual_seed(0))
    assert 0 <= frechet_distance(features, moments(features)) < 1e-5


def test_singular_covariances():
    # All in one plane of ten dimensions, one column constant, and the reference a single point.
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(50, 2, generator=generator) @ torch.randn(2, 10, generator=generator)
    features[:, 3] = 1
    assert frechet_distance(features, moments(features)) < 1e-5
    point = moments(torch.zeros(5, 10))
    own = moments(features)
    expected = (own.mean.square().sum() + own.covariance.trace()).item()
    assert frechet_distance(features, point) == pytest.approx(expected)


def test_moments_are_numpys():
    features = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    own = moments(features)
    np.testing.assert_allclose(own.covariance, np.cov(features.double().numpy(), rowvar=False), rtol=1e-12)
    np.testing.assert_allclose(own.mean, features.double().numpy().mean(0), rtol=1e-12)
    assert own.count == 30


def test_wrong_widths_and_too_few_images_are_refused():
    with pytest.raises(ValueError, match="4 columns, but the reference has 5"):
        frechet_distance(torch.zeros(3, 4), moments(torch.zeros(3, 5)))
    with pytest.raises(ValueError, match="two or more images"):
        moments(torch.zeros(1, 4))
