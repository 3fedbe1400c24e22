"""A rehearsal takes what the cell then takes, and covers what the cell covers."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.runtime import files
from benchmarks.stages import rehearse

ROW = ("rehearse", "--task", "toy", "--table", "leaderboard", "--method", "tfmq", "--precision", "w4a8")


def test_what_it_takes_and_covers_is_that_of_the_cell(suite, run, generate):
    assert generate("tfmq", "w4a8") == (0, [])
    outcome = files.read_json(Path("work/cells/toy/tfmq/w4a8/outcome.json"))["made"]["quantized"]
    assert run(*ROW) == (0, [])
    found = files.read_json(rehearse.FOLDER / "toy-tfmq-w4a8.json")
    for key in ("coverage", "size_mib", "full_precision_size_mib"):
        assert found[key] == outcome[key], key
    assert list(found["seconds"]) == [each["name"] for each in outcome["passes"]]
    counts = ("unet_evaluations", "optimizer_steps")
    assert found["effort"] == {key: sum(each[key] for each in outcome["passes"]) for key in counts}
    assert found["stored_mib"] >= found["size_mib"]
    assert 0 < found["relative_error"] < 1
    assert found["peak_memory_mib"] >= found["idle_memory_mib"] > 0
    page = rehearse.PAGE.read_text(encoding="utf-8")
    assert "| toy, TFMQ-DM, w4a8, shared layers | CPU, " in page and "Settings: the suite's, " in page
    assert f" {sum(found['seconds'].values()) / 60:.1f} |" in page
    for kind in ("conv2d", "linear"):
        rows = [row for row in found["coverage"] if (row["kind"], row["weight_bits"]) == (kind, 4)]
        assert f"- {len(rows)} {kind} w4a8" in page
    assert [path.name for path in files.WORK.iterdir() if path.name.startswith(".")] == []


def test_settings_can_be_made_smaller(suite, run):
    assert run(*ROW, "--set", "iterations=1", "steps=1") == (0, [])
    found = files.read_json(rehearse.FOLDER / "toy-tfmq-w4a8.json")
    assert found["changed_settings"]["iterations"][1] == 1
    assert "`iterations` 1 (suite: " in rehearse.PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*ROW, "--set", "iteration=1"), "did you mean 'iterations'"),
        ((*ROW, "--set", "iterations"), "error: --set iterations: write NAME=VALUE, such as iterations=100"),
        ((*ROW, "--method", "full_precision"), "there is nothing to rehearse where nothing is quantised"),
        ((*ROW, "--table", "published", "--method", "nearest"), "no choice of layers of its own is known"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(suite, run, arguments, message):
    code, (line,) = run(*arguments)
    assert code == 1 and message in line
    assert not rehearse.FOLDER.exists()
