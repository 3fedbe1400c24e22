"""Cells are drawn in rounds, as `generate` and `score` would draw them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from benchmarks import __main__ as command_line
from benchmarks.runtime import excerpt
from benchmarks.suite.record import Cell, Record


@pytest.fixture
def with_rounds(suite):
    """The tiny suite with rounds, and few rows."""
    document = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    document["rounds"] = {"images": {"toy": [4, 6]}}
    document["tables"] = {"leaderboard": document["tables"]["leaderboard"] | {"precisions": ["w4a8"]}}
    document["tables"]["published"] = {
        "protocol": "published",
        "tasks": ["toy"],
        "precisions": ["w4a8"],
        "methods": ["nearest"],
    }
    Path("params.yaml").write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")


def told(capsys, *arguments):
    assert command_line.main(["rounds", "--task", "toy", *arguments]) == 0
    return capsys.readouterr().out


def values(cell):
    return excerpt.read_from(Path("results/rounds", f"{cell.name}.npz")).values


def test_cells_are_drawn_until_claims_are_decided_or_rounds_end(with_rounds, generate, score, capsys):
    assert "- tfmq/w4a8: 4 images" in told(capsys) and not Path("results/rounds").exists()
    out = told(capsys, "--draw")
    assert "No cell goes on." in out and told(capsys) == out
    cell = Cell("toy", "tfmq", "w4a8")
    record = Record.load(Path("results/rounds", f"{cell.name}.json"))
    images = record.settings["task"]["images"]
    assert images in (4, 6) and {value.n for value in record.metrics.values()} == {images}
    assert record.cost.optimizer_steps > 0 and len(record.inputs) == 3
    refused = Record.load(Path("results/rounds/toy/nearest-published/w4a8.json"))
    assert refused.status == "not applicable" and refused.reason

    assert generate("tfmq", "w4a8") == (0, [])
    score("tfmq", "w4a8")
    scored = excerpt.read(cell).values
    for name, found in values(cell).items():
        both = min(images, len(scored[name]))
        assert len(found) == images
        np.testing.assert_allclose(found[:both], scored[name][:both], rtol=1e-5, err_msg=name)


def test_a_run_that_was_stopped_goes_on(with_rounds, monkeypatch, capsys):
    told(capsys, "--draw")
    before = {path: path.stat().st_mtime_ns for path in Path("work/rounds").rglob("*.safetensors")}
    first = values(Cell("toy", "tfmq", "w4a8"))
    for path in Path("results/rounds").rglob("tfmq/*"):
        path.unlink()
    next(path for path in before if "part" in path.name and "tfmq" in str(path)).unlink()
    told(capsys, "--draw")
    made = {path for path in before if path.stat().st_mtime_ns != before[path]}
    assert [path.name[:4] for path in made] == ["part"], "the batch that was missing, and nothing else"
    for name, found in values(Cell("toy", "tfmq", "w4a8")).items():
        np.testing.assert_array_equal(found, first[name])


def test_a_record_of_other_settings_is_none(with_rounds, capsys):
    told(capsys, "--draw")
    document = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    document["methods"]["tfmq"]["iterations"] = 3
    Path("params.yaml").write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    out = told(capsys)
    assert "- tfmq/w4a8: 4 images" in out and "- nearest/w4a8" not in out


def test_a_task_without_rounds_is_named(suite, run):
    assert run("rounds", "--task", "toy") == (
        1,
        ["error: toy is none of the tasks under `rounds.images` of params.yaml, which are none"],
    )
