"""Mean ranks over tasks, against ranks and intervals that are known."""

import numpy as np
import pytest
from scipy.stats import norm, rankdata

from benchmarks.metrics import metrics
from benchmarks.report import tables
from benchmarks.report.tables.summary import ranks
from benchmarks.suite.record import Value


@pytest.fixture
def cell(make_record, task_settings):
    def make(task, method, value, half=0.0, **changes):
        settings = {"task": task_settings | {"name": task}, "method": {}}
        measured = {"feature_distance": Value(value, value - half, value + half, 512)}
        return make_record(**{"task": task, "method": method, "settings": settings, "metrics": measured} | changes)

    return make


def test_ranks_equal_those_of_scipy():
    values = np.random.default_rng(0).integers(0, 5, (20, 6)).astype(float)
    np.testing.assert_array_equal(ranks(values), rankdata(values, axis=1))


def test_intervals_that_are_far_apart_give_exact_ranks(cell):
    order = {"one": ("tfmq", "qdiffusion", "nearest"), "two": ("qdiffusion", "tfmq", "nearest")}
    cells = [cell(task, name, 1.0 + index, 0.01) for task, names in order.items() for index, name in enumerate(names)]
    found = tables.mean_ranks(cells)["w4a8"]
    assert found == {
        "tfmq": Value(1.5, 1.5, 1.5, 2),
        "qdiffusion": Value(1.5, 1.5, 1.5, 2),
        "nearest": Value(3.0, 3.0, 3.0, 2),
    }


def test_the_best_come_first(cell):
    cells = [cell(task, name, 1.0 + i) for task in ("one", "two") for i, name in enumerate(("tfmq", "ptqd", "nearest"))]
    assert list(tables.mean_ranks(cells)["w4a8"]) == ["tfmq", "ptqd", "nearest"]


def test_equal_values_share_a_rank_and_redraws_split_them(cell):
    cells = [cell(task, name, 1.0, 0.1) for task in ("one", "two") for name in ("tfmq", "nearest")]
    assert tables.mean_ranks(cells)["w4a8"]["tfmq"] == Value(1.5, 1.0, 2.0, 2)


def test_the_interval_is_that_of_normal_draws(cell):
    """Two methods, 40 tasks: the first is better in a draw with the chance p, and the mean rank has p (1 - p) / 40."""
    cells = [cell(f"task {i}", name, v, 1.96) for i in range(40) for name, v in (("tfmq", 0.0), ("nearest", 1.0))]
    found = tables.mean_ranks(cells)["w4a8"]["tfmq"]
    chance = norm.cdf(1 / np.sqrt(2))
    middle, half = 2 - chance, 1.96 * np.sqrt(chance * (1 - chance) / 40)
    assert found.value == 1.0 == found.low
    assert found.high == pytest.approx(middle + half, abs=0.03)


def test_only_methods_measured_on_all_tasks_at_seed_0_take_part(cell):
    cells = [cell(task, name, 1.0 + i) for task in ("one", "two") for i, name in enumerate(("tfmq", "nearest"))]
    cells += [cell("one", "ptqd", 0.1), cell("two", "ptqd", 0.1, status="unverified", reason="x")]
    cells += [cell("one", "tfmq", 9.0, seed=1), cell("one", "full_precision", 0.0), cell("two", "full_precision", 0.0)]
    cells += [cell(task, "tfmq", 1.0, precision="w8a8") for task in ("one", "two")]
    found = tables.mean_ranks(cells)
    assert list(found) == ["w4a8"] and {name: value.value for name, value in found["w4a8"].items()} == {
        "tfmq": 1.0,
        "nearest": 2.0,
    }


def test_the_leaderboard_begins_with_it_where_there_are_two_tasks(cell):
    cells = [cell(task, name, 1.0 + i) for task in ("one", "two") for i, name in enumerate(("tfmq", "nearest"))]
    text = tables.leaderboard(cells, metrics())
    assert text.startswith("### Across tasks\n\nFeature distance to the full-precision image of the same noise")
    assert "| w4a8        | TFMQ-DM          |        1.00 | 1.0000 | 1.0000 |" in text
    assert text.index("### Across tasks") < text.index("### one") < text.index("### two")
    assert "Across tasks" not in tables.leaderboard(cells[:2], metrics())
    assert tables.mean_ranks(cells[:2]) == {} and tables.across_tasks(cells[:2], metrics()) == ""


def test_the_summary_has_the_best_three_of_each_precision(cell):
    names = ("qdiffusion", "tfmq", "ptqd", "nearest")
    cells = [cell(task, name, 1.0 + i, 0.01) for task in ("one", "two") for i, name in enumerate(names)]
    wide = {"qdiffusion": 1.0, "tfmq": 2.0}
    cells += [cell(task, name, value, 4.0, precision="w8a8") for task in ("one", "two") for name, value in wide.items()]
    text = tables.leaders(cells)
    rows = [[part.strip() for part in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert rows[0] == ["Precision", "First", "Second", "Third", "Methods ranked"]
    assert rows[1][:2] == ["w8a8", "Q-Diffusion, 1.00 [1.00, 2.00]"] and rows[1][3:] == ["–", "2"]
    assert rows[2] == ["w4a8", "Q-Diffusion, 1.00", "TFMQ-DM, 2.00", "PTQD, 3.00", "4"]
    assert "over 2 tasks" in text and tables.leaders(cells[:4]) == ""
