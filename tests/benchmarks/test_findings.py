"""Verdicts on claims, and the page that lists them."""

import pytest

from benchmarks import discover, findings
from benchmarks.findings import Claim, page, verdict
from benchmarks.metrics import metrics
from benchmarks.record import Value


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


def test_the_page_puts_each_claim_under_its_verdict_and_leaves_out_what_was_not_measured(make_record):
    found = {"tfmq": (0.01, 0.02), "qdiffusion": (0.03, 0.05), "nearest": (0.04, 0.2)}
    records = [make_record(method=row, metrics={"feature_distance": value(*ends)}) for row, ends in found.items()]
    records.append(make_record(method="tfmq", protocol="published", metrics={"feature_distance": value(0.001, 0.002)}))
    records.append(make_record(method="ptqd", status="failed", reason="x", metrics={}, cost=None))
    claims = [
        Claim("first", "someone", "tfmq", "qdiffusion"),
        Claim("second", "someone", "qdiffusion", "tfmq"),
        Claim("third", "someone", "nearest", "qdiffusion"),
        Claim("fourth", "someone", "tfmq-published", "tfmq"),
        Claim("fifth", "someone", "ptqd", "tfmq"),
        Claim("sixth", "someone", "tfmq", "qdiffusion", "psnr"),
    ]
    text = page(records, metrics(), claims)
    assert "Of 4 comparisons: 2 holds, 1 contradicted, 1 open." in text
    sections = text.split("### ")[1:]
    held, broken, undecided = (section.split("\n", 1)[1] for section in sections)
    assert "first" in held and "fourth" in held and "TFMQ-DM (published) 0.0015 [0.001, 0.002]" in held
    assert "second" in broken and "third" in undecided
    assert "fifth" not in text and "sixth" not in text


def test_every_claim_is_about_rows_and_metrics_that_exist():
    rows = set(discover.names(discover.METHODS))
    for claim in findings.CLAIMS:
        for row in (claim.better, claim.worse):
            method, _, protocol = row.partition("-")
            assert method in rows and protocol in ("", "published"), claim
        assert claim.metric in metrics() and metrics()[claim.metric].better, claim
    assert len(set(findings.CLAIMS)) == len(findings.CLAIMS)
