"""Images that verdicts are expected to take."""

from __future__ import annotations

import pytest

from benchmarks.planning.expected import Effect, expect
from benchmarks.suite import params
from benchmarks.suite.record import FULL_PRECISION, Cell
from tests.benchmarks.tiny_suite import PARAMS

# Claims of the rows of the tiny suite: against the cache, and the choice of layers of its own.
CACHE = "temporal_feature_matters", "tfmq", "w4a8"
OWN = "tfmq-published", "tfmq", "w4a8"
FULL, TFMQ, NEAREST = Cell("toy", FULL_PRECISION, "w32a32"), Cell("toy", "tfmq", "w4a8"), Cell("toy", "nearest", "w4a8")


def suite(margin=0.05):
    task = PARAMS["tasks"]["toy"] | {"images": 5000, "batch": 50}
    chosen = {"equal_within": margin, "rounds": {"images": {"toy": [250, 1000, 5000]}}}
    return params.parse(PARAMS | {"tasks": {"toy": task}} | chosen)


def test_large_effects_are_decided_at_once():
    known = {"one": {CACHE: Effect(-0.5, 0.3, 10_000), OWN: Effect(0.5, 0.3, 10_000)}}
    found = expect(suite(), "toy", known)
    assert found.comparisons == 2 and found.after == pytest.approx((2, 2, 2))
    assert set(found.images.values()) == {250.0}


def test_small_ones_go_on_and_full_precision_with_them():
    known = {"one": {CACHE: Effect(-0.5, 0.3, 10_000), OWN: Effect(0.02, 0.3, 10**9)}}
    found = expect(suite(margin=0.0), "toy", known)
    assert found.after[0] < 1.2 < found.after[-1]
    assert found.images[NEAREST] == 250 < 1000 < found.images[TFMQ] == found.images[FULL]
    near = expect(suite(), "toy", known)
    assert near.images[TFMQ] < found.images[TFMQ], "what is near enough is decided too"


def test_what_is_known_nowhere_takes_all_rounds():
    known = {"one": {CACHE: Effect(-0.5, 0.3, 10_000)}}
    found = expect(suite(), "toy", known)
    assert found.images[TFMQ] == found.images[Cell("toy", "tfmq", "w4a8", protocol="published")] == 5000
    assert found.after == pytest.approx((1, 1, 1))
    assert set(expect(suite(), "toy", {}).images.values()) == {5000.0}


def test_tasks_count_alike_and_stand_in_for_one_another():
    known = {
        "one": {CACHE: Effect(-0.5, 0.3, 10_000), OWN: Effect(0.5, 0.3, 10_000)},
        "two": {CACHE: Effect(-0.01, 3.0, 10**9)},
    }
    assert expect(suite(), "toy", known).images[TFMQ] == pytest.approx((250 + 5000) / 2, rel=0.02)


def test_cells_that_are_not_applicable_are_in_no_claim():
    known = {"one": {CACHE: Effect(-0.5, 0.3, 10_000), OWN: Effect(0.0, 3.0, 10_000)}}
    found = expect(suite(), "toy", known, [Cell("toy", "tfmq", "w4a8", protocol="published")])
    assert found.comparisons == 1 and found.images[TFMQ] == 250
