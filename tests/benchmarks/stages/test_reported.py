"""The pages of a suite that shows the papers' numbers, of which nothing is measured yet."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.report import tables
from benchmarks.stages import tables as stage
from benchmarks.suite import params
from benchmarks.suite.record import Value

TASK = {
    "version": 1,
    "family": "class_ldm",
    "checkpoint": "data/imagenet",
    "statistics": "downloads/imagenet.npz",
    "resolution": 256,
    "scheduler": "ddim",
    "steps": 20,
    "eta": 0.0,
    "guidance_scale": 3.0,
    "images": 50000,
    "batch": 50,
    "calibration_images": 512,
    "reference_images": 0,
    "evaluator": "inception",
    "prompts": "prompts/imagenet",
}


@pytest.fixture
def suite():
    table = {"protocol": "published", "tasks": ["imagenet-ldm4"], "precisions": ["w4a8"], "methods": ["tfmq", "ptqd"]}
    return params.parse(
        {
            "name": "paper",
            "tasks": {"imagenet-ldm4": TASK},
            "tables": {"published": table},
            "methods": {"tfmq": {}, "ptqd": {}},
            "reported": {"tasks": {"imagenet-ldm4": ["imagenet"]}, "tolerances": {"fd_data": 0.3}},
        }
    )


def test_pages_without_any_record_show_what_is_reported(suite, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("README.md").write_text(f"# The papers\n\n{tables.START}\n{tables.END}\n")
    returned = stage.run(suite)
    page = Path("results/README.md").read_text()
    region = tables.region(Path("README.md").read_text())
    assert region == returned.strip() and region in page and "## Reported" in page
    rows = [line for line in region.splitlines() if re.match(r"\| w\d", line)]
    reported = pd.read_csv(stage.REPORTED, dtype=str)
    cells = reported[reported["task"] == "imagenet"]
    assert len(rows) == len(cells.groupby(["method", "precision"]))
    ours = {(cell.method, cell.precision) for cell in suite.cells()}
    measurable = sum(row in ours for row in zip(cells["method"], cells["precision"], strict=True))
    assert 0 < measurable == region.count("not measured here |") and "failed" not in region
    assert region.count("no cell of this suite |") == len(cells) - measurable
    for value in cells["value"]:
        assert f" {value}" in region
    assert "this suite changes" in Path("results/METHODS.md").read_text()
    assert "small models" not in Path("results/FINDINGS.md").read_text()
    for name in ("README.md", "COVERAGE.md", "FINDINGS.md"):
        assert re.search(
            r"No (cell has|two rows of a claim have) been measured yet\.", Path("results", name).read_text()
        )
    assert pd.read_csv("results/cells.csv").empty


def test_what_rounds_drew_all_images_of_stands_beside_the_papers_numbers(suite, tmp_path, monkeypatch, make_record):
    """Until `dvc repro` has made the cell's own record, and only of the task's count and the present settings."""
    monkeypatch.chdir(tmp_path)
    Path("README.md").write_text(f"# The papers\n\n{tables.START}\n{tables.END}\n")

    def record(images=50000, fid=9.5, **changes):
        settings = {"task": TASK | {"name": "imagenet-ldm4", "images": images}, "method": {}}
        names = {"task": "imagenet-ldm4", "method": "tfmq", "protocol": "published"}
        found = make_record(
            **names | {"settings": settings, "metrics": {"fd_data": Value(fid, fid, fid, images)}} | changes
        )
        path = Path("results/full", f"{found.cell.name}.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(found.to_json())
        return path

    record()
    assert re.search(r"\| +9\.50 \(n 50,000\) \|", stage.run(suite))
    assert pd.read_csv("results/cells.csv").empty and "measured yet" in Path("results/FINDINGS.md").read_text()
    full = record(method="full_precision", precision="w32a32", protocol="shared", fid=99.0)
    assert "full precision has fd_data 99, expected" in stage.run(suite), "it is a gate"
    full.unlink()
    for changes in ({"images": 4000}, {"task_version": 2}):
        record(**changes)
        assert "9.50" not in stage.run(suite)
