"""Fits and likelihoods against scipy, and the decision on samples of known distributions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import integrate, optimize, stats

from tfmq.numerics.power_law import (
    follows_power_law,
    normal_log_likelihood,
    power_law_exponent,
    power_law_log_likelihood,
    uniform_log_likelihood,
    vuong_statistic,
)


def sampled(exponent: float, low: float = 1e-4, high: float = 1.0, count: int = 4000, seed: int = 0) -> np.ndarray:
    """Numbers of a power law on [low, high], by the inverse of its distribution function; both ends are among them."""
    shares = np.random.default_rng(seed).random(count)
    if exponent == 1:
        values = low * (high / low) ** shares
    else:
        ends = low ** (1 - exponent), high ** (1 - exponent)
        values = (ends[0] + shares * (ends[1] - ends[0])) ** (1 / (1 - exponent))
    return np.concatenate([values, [low, high]])


@pytest.mark.parametrize("exponent", [1.3, 2.0, 3.5])
def test_the_exponent_and_the_likelihood_are_those_of_scipys_truncated_pareto(exponent):
    x = sampled(exponent)
    low, high = x.min(), x.max()

    def minus(slope: float) -> float:
        return -stats.truncpareto.logpdf(x, slope, high / low, scale=low).sum()

    fitted = optimize.minimize_scalar(minus, bounds=(1e-3, 10), method="bounded", options={"xatol": 1e-9})
    found = power_law_exponent(torch.from_numpy(x))
    assert found.item() == pytest.approx(1 + fitted.x, abs=1e-5)
    assert found.item() == pytest.approx(exponent, rel=0.1)
    expected = stats.truncpareto.logpdf(x, found.item() - 1, high / low, scale=low)
    np.testing.assert_allclose(power_law_log_likelihood(torch.from_numpy(x)).numpy(), expected, atol=1e-8)


@pytest.mark.parametrize("exponent", [-2.0, 0.0, 0.5, 1.0, 1.7])
def test_the_density_has_an_integral_of_1_for_exponents_of_either_sign(exponent):
    x = torch.from_numpy(sampled(exponent, 0.01))
    found, likelihood = power_law_exponent(x).item(), power_law_log_likelihood(x)
    assert found == pytest.approx(exponent, abs=0.1)
    at_most = likelihood[-1].item() + found * x[-1].log().item()  # the logarithm of the constant factor
    area, _ = integrate.quad(lambda value: np.exp(at_most) * value**-found, 0.01, 1.0)
    assert area == pytest.approx(1, abs=1e-6)


def test_other_densities_are_those_of_scipy():
    x = np.random.default_rng(1).gamma(2.0, 0.1, 500)
    uniform = stats.uniform.logpdf(x, *stats.uniform.fit(x))
    np.testing.assert_allclose(uniform_log_likelihood(torch.from_numpy(x)).numpy(), uniform, atol=1e-12)
    normal = stats.norm.logpdf(x, *stats.norm.fit(x))
    np.testing.assert_allclose(normal_log_likelihood(torch.from_numpy(x)).numpy(), normal, atol=1e-12)


def test_vuongs_statistic_is_that_of_a_test_of_the_mean():
    first, second = np.random.default_rng(2).normal([[0.1], [0.0]], 1.0, (2, 300))
    t = stats.ttest_1samp(first - second, 0).statistic
    found = vuong_statistic(torch.from_numpy(first), torch.from_numpy(second))
    assert found.item() == pytest.approx(t * np.sqrt(300 / 299))
    assert vuong_statistic(torch.ones(5), torch.ones(5)) == 0


SAMPLES = {
    "power law": (sampled(1.5), True),
    "log-uniform": (sampled(1.0), True),
    "uniform": (sampled(0.0), False),
    "rising": (sampled(-2.0), False),  # a power law, and the best fit of the three, but of a negative exponent
    "normal": (np.random.default_rng(3).normal(0.5, 0.1, 4000).clip(1e-3, 1), False),
    "narrow": (np.random.default_rng(4).normal(1 / 64, 1e-4, 4000), False),
    "sharp attention": (np.random.default_rng(5).lognormal(-8, 3, 4000).clip(1e-9, 1), True),
    "constant": (np.full(100, 1 / 64), False),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_of_known_distributions_are_told_apart(name):
    x, expected = SAMPLES[name]
    assert bool(follows_power_law(torch.from_numpy(x).float(), 0.05)) == expected
    several = torch.from_numpy(np.stack([x, x[::-1].copy()])).float()
    assert follows_power_law(several, 0.05).tolist() == [expected] * 2


def test_a_uniform_distribution_is_seldom_taken_for_a_power_law():
    """It is one, of exponent 0, and a fitted exponent is never quite that: the test has to see that this is chance."""
    x = torch.from_numpy(np.random.default_rng(6).uniform(0.1, 1, (400, 500)))
    assert follows_power_law(x, 0.05).float().mean() < 0.05
