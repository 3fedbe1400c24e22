"""The tests that candidates for the ranking statistic take, and the page about them."""

from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.metrics import metrics
from benchmarks.report import ranking_page
from benchmarks.report.ranking import Evidence, known_order, outcome, places
from benchmarks.report.statistic import CANDIDATES, RANKED_BY
from benchmarks.suite.record import Cell

METHODS = ("tfmq", "qdiffusion", "ptqd", "gptq", "nearest")


@pytest.fixture
def evidence(rows):
    """Rows 0.3 apart, whose seeds move them by 0.03, at two precisions of two tasks."""
    generator = np.random.default_rng(0)
    for task in ("one", "two"):
        for place, row in enumerate(METHODS):
            for seed in range(3):
                rows.add(row, -3 + 0.3 * place + 0.03 * generator.normal(), task=task, seed=seed)
            rows.add(row, -5 + 0.3 * place, task=task, precision="w8a8")
        for seed in range(3):
            rows.add("groupwise", -2.0, task=task, seed=seed)
    for record in rows.records:
        if record.method == "groupwise":
            rows.values[record.cell] = rows.values[Cell(record.task, "groupwise", "w4a8")]
    return Evidence(rows.records, rows.values, metrics())


@pytest.fixture
def outcomes(evidence):
    return {candidate.name: outcome(candidate, evidence) for candidate in CANDIDATES}


def test_what_must_be_ordered_is(evidence, outcomes):
    found = outcomes[RANKED_BY.name]
    # Five rows at seed 0 with two precisions, and learning before rounding to nearest at four bits, at three seeds.
    assert found.ordered["one"] == (2 * (5 + 3), 2 * (5 + 3))
    assert found.scores(["one", "two"])[0] == 1.0


def test_only_neighbouring_precisions_and_known_rows_are_ordered():
    cells = [Cell("t", "tfmq", precision) for precision in ("w4a4", "w4a8", "w4a32", "w8a8")]
    pairs = {(better.precision, worse.precision) for better, worse in known_order(cells)}
    assert pairs == {("w4a8", "w4a4"), ("w4a32", "w4a8"), ("w8a8", "w4a8")}
    rows = [Cell("t", row, precision) for row in ("qdiffusion", "nearest") for precision in ("w8a8", "w4a8")]
    known = [(b.method, w.method, b.precision) for b, w in known_order(rows) if b.method != w.method]
    assert known == [("qdiffusion", "nearest", "w4a8")]


def test_separation_is_an_analysis_of_variance(evidence, outcomes):
    rows = evidence.seeded("one")["w4a8"]
    # A row that is the same at every seed draws nothing, and says nothing of seeds.
    assert [row[0].method for row in rows] == list(METHODS) and all(len(row) == 3 for row in rows)
    numbers = np.array([[np.log(evidence.values[cell]["noise_error"]).mean() for cell in row] for row in rows])
    expected = 3 * numbers.mean(1).var(ddof=1) / numbers.var(axis=1, ddof=1).mean()
    assert outcomes["noise_log"].separation["one"] == pytest.approx(expected)
    assert outcomes["noise_log"].spread["one"] == pytest.approx(np.median(numbers.std(axis=1, ddof=1)))
    assert outcomes[RANKED_BY.name].repeats["one"] == pytest.approx(1.0)


def test_all_precisions_with_several_seeds_count_alike(rows):
    generator = np.random.default_rng(1)
    for precision, spread in (("w8a8", 0.3), ("w4a8", 0.03)):
        for place, row in enumerate(METHODS):
            for seed in range(3):
                rows.add(row, -3 + 0.3 * place + spread * generator.normal(), seed=seed, precision=precision)
    both = Evidence(rows.records, rows.values, metrics())
    assert list(both.seeded("emoji-ldm4")) == ["w8a8", "w4a8"]
    alone = []
    for precision in ("w8a8", "w4a8"):
        records = [record for record in rows.records if record.precision == precision]
        alone.append(outcome(RANKED_BY, Evidence(records, rows.values, metrics())).separation["emoji-ldm4"])
    found = outcome(RANKED_BY, both)
    assert found.separation["emoji-ldm4"] == pytest.approx((alone[0] * alone[1]) ** 0.5) and alone[1] > 10 * alone[0]


def test_a_candidate_is_not_compared_with_itself(rows):
    """Where feature distances alone have another order, nothing agrees with them."""
    for place, row in enumerate(METHODS):
        rows.add(row, -3 + 0.3 * place)
    for cell, values in rows.values.items():
        rows.values[cell] = values | {"feature_distance": 1e-5 / values["feature_distance"]}
    found = {
        name: outcome(next(c for c in CANDIDATES if c.name == name), Evidence(rows.records, rows.values, metrics()))
        for name in ("feature_mean", "perceptual_mean")
    }
    assert found["feature_mean"].agrees["emoji-ldm4"] == pytest.approx(-1)
    assert found["perceptual_mean"].agrees["emoji-ldm4"] == pytest.approx(0)


def test_mean_ranks_are_over_the_tests_that_all_could_take(outcomes):
    found = places(outcomes, ["one", "two"])
    # Distances of all images, and errors of no image, can be put to no halves.
    assert "kid_fp" not in found and set(found) >= {"deviation", "feature_mean", "noise_mean"}
    assert min(found.values()) >= 1 and max(found.values()) <= len(found)
    assert places({}, []) == {}


def test_the_page_says_what_rows_rank_by_and_whether_the_data_support_it(evidence, outcomes):
    drawn = [(name, text) for name, text, _ in ranking_page.figures_of(evidence, outcomes)]
    assert [name for name, _ in drawn] == ["ranking-candidates", "ranking-seeds"]
    paths = [(caption, f"figures/{name}.png") for name, caption in drawn]
    text = ranking_page.page(evidence, outcomes, paths, simulated=1)
    assert f"Rows rank by **{RANKED_BY.label}**" in text and "![" in text
    assert "These records support it" in text or "These records do not support that" in text
    for candidate in CANDIDATES:
        assert candidate.label in text
    assert "| one | 5 at w4a8 |" in text and "Calibrations do not matter" in text and "What was not tried" in text


def test_a_choice_that_others_would_change_is_called_close(evidence):
    """The chosen one is first of those that can be chosen in three tests of four, and all others are between them."""
    told = {c.name: (0, 0, 0, index) for index, c in enumerate(CANDIDATES) if not c.is_mean}
    told |= {c.name: (-1, -1, -1, -2) for c in CANDIDATES if c.is_mean}
    told |= {RANKED_BY.name: (2, 2, 2, -1), "perceptual_log": (1, 1, 1, 99)}
    outcomes = {name: SimpleNamespace(scores=lambda _, found=found: found) for name, found in told.items()}
    text = ranking_page._support(evidence, outcomes)
    assert "These records support it: over the tests" in text
    assert "The choice is a close one: ranked together with" in text and "Perceptual distance, logarithm has" in text


def test_a_tie_is_called_one(evidence):
    told = {c.name: (-1, -1, -1, -1) for c in CANDIDATES} | dict.fromkeys((RANKED_BY.name, "noise_mean"), (1, 1, 1, 1))
    outcomes = {name: SimpleNamespace(scores=lambda _, found=found: found) for name, found in told.items()}
    assert "support it as well as Noise error, mean: each has a mean rank of 1.50" in ranking_page._support(
        evidence, outcomes
    )


def test_orders_stand_beside_those_of_many_images(evidence, outcomes):
    def many(values):
        metrics = {row: {"fd_fp": value, "psnr": -value} for row, value in zip(METHODS, values, strict=True)}
        rows = {row: {"settings": {}, "metrics": found} for row, found in metrics.items()}
        return {"task": "one", "task_version": 1, "precision": "w4a8", "images": 2048, "rows": rows}

    text = ranking_page.page(evidence, outcomes, [], simulated=1, many=[many(range(5))])
    body = text.split("## Against metrics of many images")[1].split("\n## ")[0]
    assert "one at w4a8, 5 methods: 32 or more images for the candidates, 2,048 for the metrics." in body
    assert "| Candidate | FD2048 to FP | PSNR (dB) |" in body
    assert f"| **{RANKED_BY.label}** | 1.00 | 1.00 |" in body, "both have the rows in this order; PSNR falls"
    body = ranking_page.page(evidence, outcomes, [], simulated=1, many=[many([1, 0, 2, 3, 4])])
    assert f"| **{RANKED_BY.label}** | 0.90 | 0.90 |" in body, "Spearman's with two of five exchanged"
    few = many(range(5)) | {"rows": dict(list(many(range(5))["rows"].items())[:3])}
    changed = many(range(5)) | {"task_version": 2}
    assert "Against metrics" not in ranking_page.page(evidence, outcomes, [], simulated=1, many=[few, changed])


def test_without_seeds_nothing_is_said_of_them(rows):
    assert "No cell has been measured yet." in ranking_page.page(Evidence([], {}, metrics()), {}, [])
    rows.add("tfmq", -2.0)
    found = Evidence(rows.records, rows.values, metrics())
    outcomes = {candidate.name: outcome(candidate, found) for candidate in CANDIDATES}
    text = ranking_page.page(found, outcomes, [])
    assert ranking_page.figures_of(found, outcomes) == []
    assert "too few to say" in text and "By task" not in text and "Calibrations" not in text
