"""Claims after each round, and the cells that they keep going."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from benchmarks.metrics import metrics
from benchmarks.report import rounds
from benchmarks.report.findings import Claim
from benchmarks.report.statistic import RANKED_BY
from benchmarks.suite import params
from benchmarks.suite.record import FULL_PRECISION, Cell
from tests.benchmarks.tiny_suite import PARAMS

COUNTS = [20, 60, 240]
CLAIMS = [
    Claim("reconstruction helps", "someone", "tfmq", "nearest"),
    Claim("the cache helps", "someone", "temporal_feature_matters", "tfmq"),
    Claim("it lowers the temporal error", "someone", "tfmq", "nearest", "temporal_error"),
]
NEAREST, TFMQ, CACHE = (Cell("toy", name, "w4a8") for name in ("nearest", "tfmq", "temporal_feature_matters"))
FULL = Cell("toy", FULL_PRECISION, "w32a32")


@pytest.fixture
def suite():
    task = PARAMS["tasks"]["toy"] | {"images": 500, "batch": 20}
    tables = {name: table | {"precisions": ["w4a8"]} for name, table in PARAMS["tables"].items() if name != "published"}
    chosen = {"equal_within": 0.05, "rounds": {"images": {"toy": COUNTS}}}
    return params.parse(PARAMS | {"tasks": {"toy": task}, "tables": tables} | chosen)


@pytest.fixture
def decide(suite, make_record, task_settings):
    """Decide by rows of given levels: cell -> (logarithm of its error, deviation of its own part, images)."""

    def by(**rows):
        records, values = [], {}
        shared = np.random.default_rng(0).normal(size=500)
        for index, (method, (level, noise, images)) in enumerate(rows.items(), 1):
            own = np.random.default_rng(index).normal(size=500)
            amplitude = np.exp(level + 0.3 * shared + noise * own)[:images]
            record = make_record(task="toy", method=method, settings={"task": task_settings, "method": {}})
            records.append(record)
            values[record.cell] = {
                "feature_distance": amplitude**2,
                "perceptual": amplitude**2,
                "psnr": -20 * np.log10(amplitude),
                "noise_error": amplitude,
            }
        return rounds.decide(suite, "toy", records, values, metrics(), CLAIMS)

    return by


def verdicts(decision):
    return [judged.verdict for judged in decision.claims]


def test_at_first_every_cell_has_its_first_round(decide):
    decision = decide()
    assert [judged.claim.metric for judged in decision.claims] == [RANKED_BY.name] * 2
    assert verdicts(decision) == ["open", "open"]
    assert decision.next == dict.fromkeys((FULL, NEAREST, TFMQ, CACHE), 20)


def test_cells_of_open_claims_alone_go_on(decide):
    decision = decide(nearest=(-1.0, 0.1, 20), tfmq=(-2.0, 0.1, 20), temporal_feature_matters=(-2.03, 0.1, 20))
    assert verdicts(decision) == ["confirmed", "open"]
    assert decision.next == {FULL: 60, TFMQ: 60, CACHE: 60}
    first, second = decision.claims
    assert first.p < 0.001 and second.p > 0.05 and second.looks[-1].images == 20
    assert second.interval[0] < second.looks[-1].value.low < second.looks[-1].value.high < second.interval[1]


def test_rows_that_are_near_enough_are_equal_and_none_goes_on(decide):
    decision = decide(nearest=(-1.0, 0.1, 20), tfmq=(-2.0, 0.02, 60), temporal_feature_matters=(-2.0, 0.02, 60))
    assert verdicts(decision) == ["confirmed", "equal"] and not decision.next
    assert decision.claims[0].looks[-1].images == 20, "as many as both rows have"


def test_a_margin_of_nothing_leaves_them_open(decide, suite, monkeypatch):
    monkeypatch.setitem(vars(suite), "equal_within", 0.0)
    decision = decide(nearest=(-1.0, 0.1, 60), tfmq=(-2.0, 0.02, 60), temporal_feature_matters=(-2.0, 0.02, 60))
    assert verdicts(decision) == ["confirmed", "open"] and decision.next == {FULL: 240, TFMQ: 240, CACHE: 240}


def test_the_last_round_is_the_last(decide):
    decision = decide(nearest=(-1.0, 0.1, 20), tfmq=(-2.0, 0.5, 240), temporal_feature_matters=(-2.0, 0.5, 240))
    assert verdicts(decision) == ["confirmed", "open"] and not decision.next
    assert len(decision.claims[1].looks) == 3


def test_a_row_waits_for_the_other(decide):
    decision = decide(tfmq=(-2.0, 0.1, 60), temporal_feature_matters=(-1.0, 0.1, 60))
    assert verdicts(decision) == ["open", "contradicted"]
    assert decision.next == {FULL: 20, NEAREST: 20}


def test_images_without_all_errors_do_not_count(decide, suite, make_record, task_settings):
    record = make_record(task="toy", settings={"task": task_settings, "method": {}})
    ones = np.ones(500)
    values = {record.cell: dict.fromkeys(("feature_distance", "perceptual", "psnr"), ones) | {"noise_error": ones[:10]}}
    decision = rounds.decide(suite, "toy", [record], values, metrics(), CLAIMS)
    assert decision.images == {NEAREST: 10} and decision.next[NEAREST] == 20


def test_what_is_not_applicable_is_in_no_claim(suite, make_record):
    record = make_record(
        task="toy", method="temporal_feature_matters", status="not applicable", reason="x", metrics={}, cost=None
    )
    decision = rounds.decide(suite, "toy", [record], {}, metrics(), CLAIMS)
    assert len(decision.claims) == 1 and CACHE not in decision.next


def test_findings_have_what_is_decided(decide):
    decision = decide(nearest=(-1.0, 0.1, 20), tfmq=(-2.0, 0.02, 60), temporal_feature_matters=(-2.0, 0.02, 60))
    found = rounds.decided(decision)
    assert [(each.verdict, each.images, each.level) for each in found] == [
        ("confirmed", 20, "p < 0.001"),
        ("equal", 60, "within 5%"),
    ]
    decision = decide(nearest=(-1.0, 0.1, 20), tfmq=(-2.0, 0.1, 20), temporal_feature_matters=(-2.03, 0.1, 20))
    assert [each.claim.text for each in rounds.decided(decision)] == ["reconstruction helps"]


def test_the_page_says_what_is_decided_and_what_is_next(decide, suite):
    decision = decide(nearest=(-1.0, 0.1, 20), tfmq=(-2.0, 0.1, 20), temporal_feature_matters=(-2.03, 0.1, 20))
    text = rounds.page("toy", decision, suite.rounds)
    assert "in rounds of 20, 60, 240 images" in text
    assert "Of 2 comparisons: 1 confirmed, 0 contradicted, 0 equal, 1 open." in text
    assert (
        "| reconstruction helps | w4a8 | TFMQ-DM | Round-to-nearest | 0.3" in text and "| < 0.001 | confirmed |" in text
    )
    assert "- tfmq/w4a8: 60 images" in text and "- nearest/w4a8" not in text
    assert "No cell goes on." in rounds.page("toy", dataclasses.replace(decision, next={}), suite.rounds)
