"""The committed pages of the paper suite are those that its stages write now."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from benchmarks.planning import rehearsal_page
from benchmarks.runtime import files
from benchmarks.stages import rehearse, tables
from benchmarks.suite import params
from benchmarks.suite.record import FULL_PRECISION


@pytest.fixture
def paper(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the suite's folder, as git knows it, to work in; returns the original."""
    original = root / "benchmarks" / "paper"
    ignored = shutil.ignore_patterns("data", "downloads", "images", "work", ".resume")
    shutil.copytree(original, tmp_path / "paper", ignore=ignored)
    monkeypatch.chdir(tmp_path / "paper")
    return original


def test_the_tables_are_those_of_records_and_settings(paper):
    pages = ("README.md", "METHODS.md", "COVERAGE.md", "FINDINGS.md", "RANKING.md")
    names = ["README.md", *(f"results/{name}" for name in pages)]
    for name in names[1:]:
        Path(name).unlink()
    tables.run(params.load(Path("params.yaml")))
    for name in names:
        assert Path(name).read_text(encoding="utf-8") == (paper / name).read_text(encoding="utf-8"), (
            f"{name} is old: run `python -m benchmarks tables --suite paper`"
        )


def test_the_page_of_rehearsals_is_that_of_its_files(paper):
    found = [files.read_json(path) for path in sorted((paper / rehearse.FOLDER).glob("*.json"))]
    assert found and rehearsal_page.page(found) == (paper / rehearse.PAGE).read_text(encoding="utf-8")


def test_the_page_says_what_the_plan_says(paper):
    page = Path("README.md").read_text(encoding="utf-8")
    text = Path("results/PLAN.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    columns = {row[0]: {name: column for column, name in enumerate(row)} for row in rows if row[0] in ("Task", "Step")}
    (all_tasks,) = (row for row in rows if row[0] == "all")
    disk, hours = (float(all_tasks[columns["Task"][name]].replace(",", "")) for name in ("Disk (GiB)", "Hours"))
    assert f"all cells take {hours:,.0f} hours and {disk:,.0f} GiB of disk" in " ".join(page.split())
    bedrooms = {row[0]: row for row in rows[: [row[0] for row in rows].index("fetch lsun-churches-ldm8")]}
    full, learned = (
        float(bedrooms[name][columns["Step"]["Hours"]]) for name in ("full_precision", "tfmq-published/w8a8")
    )
    assert f"full precision takes {full:.1f} hours and TFMQ-DM at w8a8 {learned:.1f}" in " ".join(page.split())
    assert "210 GiB" in bedrooms["tfmq-published/w8a8"][columns["Step"]["Note"]]
    full = sum(
        float(row[columns["Step"]["Hours"]].replace(",", ""))
        for row in rows
        if row[0] == FULL_PRECISION and len(row) > 9
    )
    assert f"**Full precision** of all tasks takes {full:.0f} hours" in " ".join(page.split())
    table = text.split("\n## coco-sdxl\n")[1].split("\n## ")[0]
    waiting = [int(gib.replace(",", "")) for gib in re.findall(r"learns, ([\d,]+) GiB", table)]
    assert max(waiting) == 188 and "up to 188 GiB on Stable Diffusion XL" in " ".join(page.split())


def test_the_plan_has_every_cell(paper):
    suite = params.load(Path("params.yaml"))
    text = Path("results/PLAN.md").read_text(encoding="utf-8")
    for task in suite.tasks:
        table = text.split(f"\n## {task}\n")[1].split("\n## ")[0]
        steps = {line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")}
        cells = {cell.name.removeprefix(f"{task}/") for cell in suite.cells() if cell.task == task}
        old = {name for name in cells - steps if not name.startswith(FULL_PRECISION)}
        assert not old, "run `python -m benchmarks plan --teraflops 40 > results/PLAN.md` in the suite's folder"
