"""Verdicts on claims, and the page that lists them."""

import numpy as np
import pytest
from scipy.stats import norm

from benchmarks.metrics import metrics
from benchmarks.report import findings
from benchmarks.report.findings import Claim, page, verdict
from benchmarks.report.tables import difference
from benchmarks.suite import discover
from benchmarks.suite.record import Value


def value(low, high):
    return Value(value=(low + high) / 2, low=low, high=high, n=9)


@pytest.mark.parametrize(
    ("better", "worse", "direction", "expected"),
    [
        ((1, 2), (3, 4), "lower", "holds"),
        ((3, 4), (1, 2), "lower", "contradicted"),
        ((1, 3), (3, 4), "lower", "open"),
        ((3, 4), (1, 2), "higher", "holds"),
        ((1, 2), (3, 4), "higher", "contradicted"),
        ((1, 9), (3, 4), "higher", "open"),
        ((2, 2), (2, 2), "lower", "open"),
    ],
)
def test_only_intervals_that_are_apart_decide(better, worse, direction, expected):
    assert verdict(value(*better), value(*worse), direction) == expected


def test_a_difference_has_the_standard_error_of_its_pairs():
    better, worse = np.array([0.1, 0.4, 0.2, 0.3]), np.array([0.2, 0.6, 0.3, 0.3])
    found = difference(better, worse)
    error = np.sqrt(((better - worse + 0.1) ** 2).sum() / 3 / 4)
    assert found.value == pytest.approx(-0.1) and found.n == 4
    assert found.low == pytest.approx(-0.1 + norm.ppf(0.025) * error, abs=1e-5)
    assert found.high == pytest.approx(-0.1 + norm.ppf(0.975) * error, abs=1e-5)


class Rows:
    """Records of rows, and the values of their images: a common part that varies much, and a shift."""

    def __init__(self, make_record):
        self.make_record, self.records, self.images = make_record, [], {}
        self.common = np.random.default_rng(0).normal(0.5, 0.2, 50)

    def add(self, row, shift, noise=0.001, metric="feature_distance", **changes):
        values = self.common + shift + noise * np.random.default_rng(len(self.records)).normal(size=50)
        margin = 1.96 * values.std(ddof=1) / 50**0.5
        measured = {metric: Value(values.mean(), values.mean() - margin, values.mean() + margin, 50)}
        self.records.append(self.make_record(method=row, metrics=measured, **changes))
        self.images[self.records[-1].cell] = {metric: values}


def sections(text):
    return [section.split("\n", 1)[1] for section in text.split("### ")[1:]]


def test_claims_are_judged_by_pairs_and_what_was_not_measured_is_left_out(make_record):
    rows = Rows(make_record)
    rows.add("tfmq", 0.0)
    rows.add("qdiffusion", 0.01)
    rows.add("nearest", 0.02, noise=0.2)
    rows.add("tfmq", -0.01, protocol="published")
    rows.records.append(make_record(method="ptqd", status="failed", reason="x", metrics={}, cost=None))
    claims = [
        Claim("first", "someone", "tfmq", "qdiffusion"),
        Claim("second", "someone", "qdiffusion", "tfmq"),
        Claim("third", "someone", "nearest", "qdiffusion"),
        Claim("fourth", "someone", "tfmq-published", "tfmq"),
        Claim("fifth", "someone", "ptqd", "tfmq"),
        Claim("sixth", "someone", "tfmq", "qdiffusion", "psnr"),
    ]
    text = page(rows.records, rows.images, metrics(), claims)
    assert "Of 4 comparisons, 2 hold, 1 do not hold, 1 are open." in text
    held, broken, undecided = sections(text)
    assert "first" in held and "fourth" in held and "| TFMQ-DM (published) 0.516 [" in held
    assert "second" in broken and "third" in undecided
    assert "fifth" not in text and "sixth" not in text
    assert verdict(*(record.metrics["feature_distance"] for record in rows.records[:2]), "lower") == "open"


def test_metrics_that_are_no_mean_over_images_are_judged_by_their_intervals(make_record):
    found = {"tfmq": (0.01, 0.02), "qdiffusion": (0.03, 0.05), "nearest": (0.04, 0.2)}
    records = [make_record(method=row, metrics={"kid_fp": value(*ends)}) for row, ends in found.items()]
    claims = [
        Claim("first", "someone", "tfmq", "qdiffusion", "kid_fp"),
        Claim("second", "someone", "qdiffusion", "nearest", "kid_fp"),
    ]
    held, _, undecided = sections(page(records, {}, metrics(), claims))
    assert "first" in held and "TFMQ-DM 0.015 [0.01, 0.02] |" in held and held.rstrip().endswith("| – |")
    assert "second" in undecided


def test_a_higher_metric_is_better_the_other_way_round(make_record):
    rows = Rows(make_record)
    rows.add("tfmq", 1.0, metric="psnr")
    rows.add("qdiffusion", 0.0, metric="psnr")
    held, _, _ = sections(page(rows.records, rows.images, metrics(), [Claim("it", "us", "tfmq", "qdiffusion", "psnr")]))
    assert "it" in held and held.rstrip().endswith("| 1 |")


def test_calibration_seeds_have_to_agree(make_record):
    rows = Rows(make_record)
    for seed, other in ((0, 0.01), (1, -0.03)):
        rows.add("tfmq", 0.0, noise=0.0, seed=seed)
        rows.add("qdiffusion", other, noise=0.0, seed=seed)
        rows.add("ptqd", 0.04, noise=0.0, seed=seed)
    rows.add("nearest", 0.0, seed=1)
    claims = [
        Claim("first", "us", "tfmq", "qdiffusion"),
        Claim("second", "us", "tfmq", "nearest"),
        Claim("third", "us", "tfmq", "ptqd"),
    ]
    text = page(rows.records, rows.images, metrics(), claims)
    held, _, undecided = sections(text)
    assert "first" in undecided and "| -0.01; other seeds 0.03 |" in undecided
    assert "third" in held and "| -0.04; other seeds -0.04 |" in held
    assert "Of 2 comparisons, 1 hold, 0 do not hold, 1 are open." in text and "second" not in text
    # Of 0 and 0, of 0.01 and -0.03, and of 0.04 and 0.04.
    assert "has a standard deviation of 0 (median over 3 rows; the largest is 0.028)." in text


def test_every_claim_is_about_rows_and_metrics_that_exist():
    rows = set(discover.names(discover.METHODS))
    for claim in findings.CLAIMS:
        for row in (claim.better, claim.worse):
            method, _, others = row.partition("-")
            assert method in rows and others in ("", "published", "deployable-executed"), claim
        assert claim.metric in metrics() and metrics()[claim.metric].better, claim
    assert len(set(findings.CLAIMS)) == len(findings.CLAIMS)
