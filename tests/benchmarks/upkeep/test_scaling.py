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


def test_the_script_of_the_paper_suite_names_its_tables(root):
    script = (root / "examples" / "cluster" / "paper.sh").read_text(encoding="utf-8")
    (tables,) = re.findall(r"for table in (.*); do", script)
    assert tables.split() == list(yaml.safe_load((PAPER / "params.yaml").read_text(encoding="utf-8"))["tables"])
