"""Mean ranks over tasks, against ranks and intervals that are known."""

import numpy as np
import pytest
from scipy.stats import rankdata

from benchmarks.metrics import metrics
from benchmarks.report import tables
from benchmarks.report.tables.summary import ranks
from benchmarks.suite.record import Value


def test_ranks_equal_those_of_scipy():
    values = np.random.default_rng(0).integers(0, 5, (20, 6)).astype(float)
    np.testing.assert_array_equal(ranks(values), rankdata(values, axis=1))


def fill(rows, order, noise=0.01, **changes):
    """Rows of each task, 0.3 apart in the order given."""
    for task, names in order.items():
        for index, name in enumerate(names):
            rows.add(name, -2 + 0.3 * index, noise=noise, task=task, **changes)


def test_rows_that_are_far_apart_have_exact_ranks(rows):
    fill(rows, {"one": ("tfmq", "qdiffusion", "nearest"), "two": ("qdiffusion", "tfmq", "nearest")})
    assert tables.mean_ranks(rows.records, rows.judges)["w4a8"] == {
        "qdiffusion": Value(1.5, 1.5, 1.5, 2),
        "tfmq": Value(1.5, 1.5, 1.5, 2),
        "nearest": Value(3.0, 3.0, 3.0, 2),
    }


def test_the_best_come_first(rows):
    fill(rows, dict.fromkeys(("one", "two"), ("tfmq", "ptqd", "nearest")))
    assert list(tables.mean_ranks(rows.records, rows.judges)["w4a8"]) == ["tfmq", "ptqd", "nearest"]


def test_equal_rows_share_a_rank(rows):
    for task in ("one", "two"):
        for name in ("tfmq", "nearest"):
            rows.add(name, -2.0, task=task)
    found = tables.mean_ranks(rows.records, rows.judges)["w4a8"]
    assert [value.value for value in found.values()] == [1.5, 1.5]


def test_what_images_have_in_common_moves_no_rank(rows):
    """Images vary by 0.3 in all rows alike, and rows differ by 0.02: of independent redraws many would swap them."""
    for task in ("one", "two"):
        for name, level in (("tfmq", -2.0), ("nearest", -1.98)):
            rows.add(name, level, noise=0.001, task=task)
    found = tables.mean_ranks(rows.records, rows.judges)["w4a8"]
    assert found["tfmq"] == Value(1.0, 1.0, 1.0, 2) and found["nearest"] == Value(2.0, 2.0, 2.0, 2)


def test_rows_that_images_do_not_tell_apart_have_wide_intervals(rows):
    for task in ("one", "two"):
        for name, level in (("tfmq", -2.0), ("nearest", -1.99)):
            rows.add(name, level, noise=0.5, task=task)
    found = tables.mean_ranks(rows.records, rows.judges)["w4a8"]
    assert all((value.low, value.high) == (1.0, 2.0) for value in found.values())


def test_calibrations_widen_intervals(rows):
    generator = np.random.default_rng(5)
    for task in ("one", "two"):
        for name in ("tfmq", "nearest", "ptqd", "gptq"):
            for seed in range(3):
                rows.add(name, -2 + 0.3 * generator.normal(), noise=0.001, task=task, seed=seed)
    assert all(value.high - value.low > 0.9 for value in tables.mean_ranks(rows.records, rows.judges)["w4a8"].values())


def test_only_methods_measured_on_all_tasks_take_part(rows):
    fill(rows, dict.fromkeys(("one", "two"), ("tfmq", "nearest")))
    rows.add("ptqd", -4.0, task="one")
    rows.add("full_precision", -9.0, task="one", precision="w32a32")
    rows.add("gptq", -5.0, task="one")
    rows.add("gptq", -5.0, task="two", status="unverified", reason="x")
    fill(rows, {"one": ("tfmq",), "two": ("tfmq",)}, precision="w8a8")
    found = tables.mean_ranks(rows.records, rows.judges)
    assert {p: {name: value.value for name, value in of.items()} for p, of in found.items()} == {
        "w4a8": {"tfmq": 1.0, "nearest": 2.0}
    }


def test_the_leaderboard_begins_with_it_where_there_are_two_tasks(rows):
    fill(rows, dict.fromkeys(("one", "two"), ("tfmq", "nearest")), noise=0.0)
    text = tables.leaderboard(rows.records, metrics(), rows.judges)
    assert text.startswith("### Across tasks\n\nDeviation on each task")
    level = np.exp(rows.judges["one"].mean("deviation", "tfmq", "w4a8"))
    assert f"| w4a8        | TFMQ-DM          |        1.00 | {level:.4f} | {level:.4f} |" in text
    assert text.index("### Across tasks") < text.index("### one") < text.index("### two")
    alone = rows.records[:2]
    assert "Across tasks" not in tables.leaderboard(alone, metrics(), rows.judges)
    assert tables.mean_ranks(alone, rows.judges) == {} and tables.across_tasks(alone, rows.judges) == ""


def test_the_summary_has_the_best_three_of_each_precision(rows):
    fill(rows, dict.fromkeys(("one", "two"), ("qdiffusion", "tfmq", "ptqd", "nearest")))
    for task in ("one", "two"):
        for name, level in (("qdiffusion", -2.0), ("tfmq", -1.95)):
            rows.add(name, level, noise=1.0, task=task, precision="w8a8")
    text = tables.leaders(rows.records, rows.judges)
    found = [[part.strip() for part in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert found[0] == ["Precision", "First", "Second", "Third", "Methods ranked"]
    assert found[1][0] == "w8a8" and found[1][1].endswith("[1.00, 2.00]") and found[1][3:] == ["–", "2"]
    assert found[2] == ["w4a8", "Q-Diffusion, 1.00", "TFMQ-DM, 2.00", "PTQD, 3.00", "4"]
    assert "over 2 tasks" in text and tables.leaders(rows.records[:4], rows.judges) == ""


@pytest.mark.parametrize("missing", ["psnr", "noise_error"])
def test_a_row_without_a_part_of_the_statistic_has_no_rank(rows, missing):
    fill(rows, dict.fromkeys(("one", "two"), ("tfmq", "nearest", "ptqd")))
    for cell in rows.values:
        if cell.method == "ptqd":
            del rows.values[cell][missing]
    assert list(tables.mean_ranks(rows.records, rows.judges)["w4a8"]) == ["tfmq", "nearest"]
