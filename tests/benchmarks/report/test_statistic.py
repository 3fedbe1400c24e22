"""Candidates for the ranking statistic, against the same numbers in other ways."""

import numpy as np
import pytest
from scipy.stats import gmean

from benchmarks.metrics import metrics
from benchmarks.report.statistic import CANDIDATES, RANKED_BY, logarithm
from benchmarks.suite.record import Value

METRICS = metrics()
BY_NAME = {candidate.name: candidate for candidate in CANDIDATES}


@pytest.fixture
def values():
    generator = np.random.default_rng(0)
    return {
        "feature_distance": generator.uniform(0.01, 0.3, 20),
        "perceptual": generator.uniform(0.01, 0.3, 20),
        "psnr": generator.uniform(10, 30, 20),
        "noise_error": generator.uniform(0.01, 0.3, 12),
    }


def test_means_of_logarithms_are_geometric_means(values, make_record):
    found = {name: c.of(make_record(), c.of_images(values, METRICS), METRICS) for name, c in BY_NAME.items()}
    distance = values["feature_distance"]
    # The amplitude of a squared distance is its root.
    assert found["feature_log"] == pytest.approx(np.log(gmean(distance) ** 0.5))
    assert found["feature_median"] == pytest.approx(np.log(np.sort(distance)[9:11]).mean() / 2)
    assert found["feature_mean"] == pytest.approx(np.log(distance.mean()))
    assert found["feature_trimmed"] == pytest.approx(np.log(np.sort(distance)[2:-2].mean()))
    error = 10 ** (-values["psnr"] / 20)
    assert found["pixel_log"] == pytest.approx(np.log(gmean(error)))
    assert found["noise_log"] == pytest.approx(np.log(gmean(values["noise_error"])))
    # Of metrics of unequally many images, those that all have.
    four = gmean([distance[:12] ** 0.5, values["perceptual"][:12] ** 0.5, error[:12], values["noise_error"]], axis=0)
    assert found["deviation"] == pytest.approx(np.log(gmean(four)))


def test_metrics_of_no_images_are_those_of_the_record(make_record):
    record = make_record(metrics={"fd_fp": Value(20.0, 10, 30, 9), "kid_fp": Value(-0.01, -0.1, 0.1, 9)})
    assert BY_NAME["fd_fp"].of(record, None, METRICS) == pytest.approx(np.log(20))
    assert BY_NAME["kid_fp"].of(record, None, METRICS) == -0.01
    assert BY_NAME["temporal_error"].of(record, None, METRICS) is None
    assert BY_NAME["deviation"].of_images({"psnr": np.ones(3)}, METRICS) is None
    assert BY_NAME["deviation"].of(record, None, METRICS) is None


def test_images_that_cannot_be_told_apart_have_the_last_decimal():
    found = logarithm(METRICS["noise_error"], np.array([0.0, 1e-9, 0.5]))
    assert found == pytest.approx(np.log([1e-4, 1e-4, 0.5]))


def test_what_rows_rank_by_can_be_judged_by_image():
    assert RANKED_BY.is_mean and RANKED_BY in CANDIDATES
    assert len(BY_NAME) == len({candidate.label for candidate in CANDIDATES}) == len(CANDIDATES)
    assert all(name in METRICS for candidate in CANDIDATES for name in candidate.metrics)
