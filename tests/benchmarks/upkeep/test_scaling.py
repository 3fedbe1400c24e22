"""How long units take on GPUs that are not there."""

from __future__ import annotations

import re

import pytest
import yaml

from benchmarks.suite import params
from benchmarks.upkeep import scaling
from benchmarks.upkeep.scaling import HOUR, PAPER, Unit, bound, longest_first, makespan


def test_units_start_when_a_gpu_is_free_and_what_follows_them_comes_last():
    a, b, c = Unit(3.0, (Unit(1.0), Unit(1.0))), Unit(1.0), Unit(1.0)
    assert makespan([[a, b, c]], 1) == 7.0 == bound([[a, b, c]], 1)
    # b and c beside a, which two units follow.
    assert makespan([[a, b, c]], 2) == 4.0
    assert makespan([[b, c], [a]], 2) == 5.0, "a phase waits for the one before"
    assert bound([[a, b, c]], 8) == 3.0, "the longest unit"
    assert makespan([[b, c, a]], 2) == 5.0 and makespan(longest_first([[b, c, a]]), 2) == 4.0


def test_the_plan_of_the_paper_suite_has_all_its_cells_and_hours():
    suite, page = params.load(PAPER / "params.yaml"), (PAPER / "results" / "PLAN.md").read_text(encoding="utf-8")
    tasks = scaling.read_plan(page, suite)
    total = sum(unit.all_seconds for phase in scaling.stages(tasks) for unit in phase) / HOUR
    (hours,) = re.findall(r"^\| all +\|.*\|\s*([\d,.]+) \|[^|]*\|$", page, re.MULTILINE)
    assert total == pytest.approx(float(hours.replace(",", "")), rel=1e-3)
    assert bound(scaling.together(tasks), 1) == pytest.approx(total * HOUR)


def test_the_page_of_clusters_says_what_the_plan_gives(root):
    suite, plan = params.load(PAPER / "params.yaml"), (PAPER / "results" / "PLAN.md").read_text(encoding="utf-8")
    tasks = scaling.read_plan(plan, suite)
    text = " ".join((root / "docs" / "cluster.md").read_text(encoding="utf-8").split())
    longest = max(unit.seconds for task in tasks for row in task.rows.values() for unit in row) / HOUR
    assert f"for up to {longest:.0f} hours each" in text
    told = re.findall(r"\| (\d+) \| ([\d.,]+) h \|", text)
    assert [int(gpus) for gpus, _ in told] == scaling.GPUS
    for gpus, hours in told:
        least = bound(scaling.together(tasks), int(gpus)) / HOUR
        assert float(hours.replace(",", "")) == pytest.approx(least, rel=0.01), (
            "run `python -m benchmarks.upkeep.scaling`"
        )


def test_numbers_of_gpus_are_checked(capsys):
    with pytest.raises(SystemExit):
        scaling.main(["--gpus", "8", "0"])
    assert "0 is not a whole number of at least 1" in capsys.readouterr().err


def test_the_script_of_the_paper_suite_names_its_tables(root):
    script = (root / "examples" / "cluster" / "paper.sh").read_text(encoding="utf-8")
    (tables,) = re.findall(r"for table in (.*); do", script)
    assert tables.split() == list(yaml.safe_load((PAPER / "params.yaml").read_text(encoding="utf-8"))["tables"])
