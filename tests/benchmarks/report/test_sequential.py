"""Tests that look several times keep their level, and still decide."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import multivariate_normal, norm

from benchmarks.report.inference import adjusted
from benchmarks.report.sequential import SPENDINGS, critical_values, decided, sequential_p
from benchmarks.suite import sections

EVEN = (0.2, 0.4, 0.6, 0.8, 1.0)
UNEQUAL = (0.005, 0.02, 0.1, 1.0)


def statistics(fractions, families, comparisons=1, drift=0.0, seed=0):
    """Z (R, M, K) at each look, of comparisons whose Z at the end has the mean ``drift``."""
    generator = np.random.default_rng(seed)
    steps = np.diff(fractions, prepend=0) ** 0.5
    motion = (generator.normal(size=(families, comparisons, len(fractions))) * steps).cumsum(2)
    return (motion + np.asarray(drift)[..., None] * np.array(fractions)) / np.array(fractions) ** 0.5


# As the program `ld98` has them (Reboussin, DeMets, Kim and Lan, 2000, Controlled Clinical Trials 21); its integral is
# coarser, by 1e-4 in one of them, where two looks are a bivariate normal distribution.
@pytest.mark.parametrize(
    ("spending", "published"),
    [
        ("obrien_fleming", [4.8769, 3.3569, 2.6803, 2.2898, 2.0310]),
        ("pocock", [2.4380, 2.4268, 2.4101, 2.3966, 2.3859]),
    ],
)
def test_critical_values_are_the_published_ones(spending, published):
    assert critical_values(EVEN, 0.05, spending) == pytest.approx(published, abs=1.2e-4)


@pytest.mark.parametrize("spending", SPENDINGS)
def test_two_looks_are_a_bivariate_normal_distribution(spending):
    fractions = (0.2, 0.4)
    bounds = np.array(critical_values(fractions, 0.05, spending))
    shared = (fractions[0] / fractions[1]) ** 0.5
    both = multivariate_normal(cov=[[1, shared], [shared, 1]], abseps=1e-12, releps=1e-12)
    stayed = both.cdf(bounds, lower_limit=-bounds)
    assert 1 - stayed == pytest.approx(SPENDINGS[spending](fractions[1], 0.05), rel=1e-5)


@pytest.mark.parametrize("spending", SPENDINGS)
@pytest.mark.parametrize("fractions", [EVEN, UNEQUAL])
def test_motion_crosses_as_often_as_was_spent(spending, fractions):
    bounds = critical_values(fractions, 0.2, spending)
    crossed = (np.abs(statistics(fractions, 200_000)[:, 0]) >= bounds).cumsum(1) > 0
    spent = [SPENDINGS[spending](fraction, 0.2) for fraction in fractions]
    assert crossed.mean(0) == pytest.approx(spent, abs=0.004)
    assert spent[-1] == pytest.approx(0.2)


def test_one_look_is_the_usual_test():
    for spending in SPENDINGS:
        assert critical_values([1.0], 0.05, spending) == pytest.approx([norm.ppf(0.975)])
        assert sequential_p([0.03], [1.0], spending) == pytest.approx(0.03, rel=1e-4)


@pytest.mark.parametrize("spending", SPENDINGS)
def test_a_probability_is_the_level_that_would_just_decide(spending):
    for statistic in statistics(UNEQUAL, 8, drift=2.0)[:, 0]:
        found = sequential_p(2 * norm.sf(np.abs(statistic)), UNEQUAL, spending)
        for level in (found * 1.01, found * 0.99):
            if level < 1:
                crossed = (np.abs(statistic) >= critical_values(UNEQUAL, level, spending)).any()
                assert crossed == (level > found)


def test_what_was_seen_stays_seen():
    first = sequential_p([1e-6], UNEQUAL, "pocock")
    assert first < 0.05
    assert sequential_p([1e-6, 0.9, 0.9, 0.9], UNEQUAL, "pocock") == pytest.approx(first)
    assert sequential_p([], UNEQUAL, "pocock") == 1
    assert sequential_p([0.0], UNEQUAL, "pocock") < 1e-9


@pytest.mark.parametrize("spending", SPENDINGS)
@pytest.mark.parametrize("true", [0, 4])
def test_a_family_is_wrong_at_most_at_its_level(spending, true):
    """Of ten comparisons some differ; that any other is decided, at any look, is as rare as promised."""
    drift = np.repeat([6.0, 0.0], [true, 10 - true])
    found = decided(np.abs(statistics(UNEQUAL, 20_000, 10, drift)), UNEQUAL, 0.05, spending)
    assert found[:, true:].any(1).mean() <= 0.05 + 3 * (0.05 * 0.95 / 20_000) ** 0.5
    if true:
        assert found[:, :true].mean() > 0.9


def test_a_comparison_that_keeps_its_calibration_is_decided_less_often():
    """Where a part of the error does not shrink with images, looks are more alike than motion: the level holds."""
    generator = np.random.default_rng(0)
    fractions = np.array(UNEQUAL)
    images = statistics(UNEQUAL, 100_000)[:, 0] / fractions**0.5
    total = (1 / fractions + 4.0) ** 0.5
    found = (images + 2 * generator.normal(size=(100_000, 1))) / total
    bounds = critical_values(UNEQUAL, 0.05, "pocock")
    assert (np.abs(found) >= bounds).any(1).mean() < 0.05


def test_families_at_once_are_decided_as_one_by_one():
    drawn = np.abs(statistics(UNEQUAL, 6, 5, np.array([0.0, 1.0, 2.5, 3.5, 5.0])))
    for family, found in zip(drawn, decided(drawn, UNEQUAL, 0.05, "pocock"), strict=True):
        corrected = adjusted([sequential_p(2 * norm.sf(each), UNEQUAL, "pocock") for each in family])
        assert [p < 0.05 for p in corrected] == found.tolist()


def test_looking_costs_little_power_and_saves_most_images():
    rounds = (0.05, 0.2, 1.0)
    bounds = critical_values(rounds, 0.05, "pocock")

    def crossed(drift):
        return (np.abs(statistics(rounds, 50_000, drift=drift)[:, 0]) >= bounds).cumsum(1) > 0

    single = norm.ppf(0.975) + norm.ppf(0.8)
    assert crossed(single)[:, -1].mean() > 0.74, "a single look at all images has 0.80"
    images = np.diff(rounds, prepend=0) @ np.vstack([np.ones(50_000), ~crossed(3 * single)[:, :-1].T])
    assert images.mean() < 0.3, "of an effect three times as large"


@pytest.mark.parametrize("fractions", [[], [0.0, 1.0], [0.5, 0.5], [0.6, 0.3], [0.5, 1.2]])
def test_fractions_rise_to_one(fractions):
    with pytest.raises(ValueError, match="information fraction"):
        critical_values(fractions, 0.05, "pocock")


def test_levels_are_between_0_and_1():
    with pytest.raises(ValueError, match="level is 1"):
        critical_values([1.0], 1.0, "pocock")


def test_params_names_what_there_is():
    assert tuple(SPENDINGS) == sections.SPENDINGS
