"""Cells are named as people would, made anew in a scratch folder, and compared with their records."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.runtime import files
from benchmarks.suite import params
from benchmarks.suite.record import Cell
from benchmarks.upkeep import INTERRUPTED, STOPPED, carry_over, reproduce


@pytest.fixture
def small(root):
    return params.load(root / "params.yaml")


def names(*arguments, **options):
    return [cell.name for cell in reproduce.chosen(*arguments, **options)]


def test_without_names_all_methods_of_one_task_at_one_precision_are_meant(small):
    found = names(small, [])
    assert found[:3] == ["emoji-ldm4/tfmq/w4a8", "emoji-ldm4/nearest/w4a8", "emoji-ldm4/ptq4dm/w4a8"]
    assert len(found) == len(small.tables["leaderboard"].methods)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("emoji-ldm4/tfmq/w4a8", lambda cell: cell.name == "emoji-ldm4/tfmq/w4a8"),
        ("emoji-ldm4/tfmq/w4a8-s2", lambda cell: cell.name == "emoji-ldm4/tfmq/w4a8-s2"),
        ("emoji-ldm4/tfmq-published/w4a8", lambda cell: cell.name == "emoji-ldm4/tfmq-published/w4a8"),
        ("emoji-ldm4/tfmq", lambda cell: (cell.task, cell.row) == ("emoji-ldm4", "tfmq")),
        ("emoji-ldm4/tfmq/", lambda cell: (cell.task, cell.row) == ("emoji-ldm4", "tfmq")),
        ("results/records/emoji-ldm4/tfmq/w4a8-s1.json", lambda cell: cell.name == "emoji-ldm4/tfmq/w4a8-s1"),
        ("emoji-ldm4/full_precision/w32a32", lambda cell: cell.name == "emoji-ldm4/full_precision/w32a32"),
        ("emoji-*/tfmq/w4a8", lambda cell: (cell.row, cell.precision, cell.seed) == ("tfmq", "w4a8", 0)),
        ("emoji-text", lambda cell: cell.task == "emoji-text"),
        ("*/w8a8", lambda cell: (cell.precision, cell.seed) == ("w8a8", 0)),
    ],
)
def test_cells_rows_tasks_and_patterns_are_names(small, name, meant):
    expected = [cell.name for cell in small.cells() if meant(cell)]
    assert expected and sorted(names(small, [name])) == sorted(expected)


def test_names_add_up_and_draws_can_be_repeated(small):
    assert names(small, ["emoji-ldm4/tfmq/w4a8", "emoji-ldm4/tfmq", "emoji-ldm4/tfmq/w4a8"])[0].endswith("w4a8")
    row = names(small, ["emoji-ldm4/tfmq"])
    assert sorted(names(small, ["emoji-ldm4/tfmq/w4a8", "emoji-ldm4/tfmq"])) == sorted(row)
    drawn = names(small, [], count=5, seed=1)
    assert len(set(drawn)) == 5 and drawn == names(small, [], count=5, seed=1) != names(small, [], count=5, seed=2)
    assert set(names(small, ["emoji-text"], count=500)) == set(names(small, ["emoji-text"]))


def test_a_name_that_fits_nothing_gets_the_nearest(small):
    with pytest.raises(ValueError, match="did you mean 'emoji-ldm4/tfmq/w4a8'"):
        reproduce.chosen(small, ["emoji-ldm4/tfqm/w4a8"])
    with pytest.raises(ValueError, match="did you mean 'emoji-text'"):
        reproduce.chosen(small, ["emoji-txt"])
    with pytest.raises(ValueError, match=r"did you mean '\*/tfmq/\*'"):
        reproduce.chosen(small, ["tfmq"])


@pytest.fixture
def measured(suite, generate, score):
    """The tiny suite with two measured cells, one of them of two calibration seeds."""
    assert generate("nearest", "w4a8") == (0, [])
    score("nearest", "w4a8")
    return suite


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_cell_is_made_anew_beside_the_results_and_equals_its_record(measured, capsys):
    before = contents(measured)
    assert reproduce.main(["toy/nearest/w4a8", "--shards", "1"]) == 0
    out = capsys.readouterr().out
    assert out.count("identical") == 3 and "1/2    toy/full_precision/w32a32" in out
    assert re.search(r"2 cells in \d+ s: 2 identical, bit for bit\.", out)
    assert contents(measured) == before


def test_a_falsified_digit_is_found_and_named(measured, capsys):
    path = measured / "results/records/toy/nearest/w4a8.json"
    record = json.loads(path.read_text())
    record["metrics"]["psnr"]["value"] += 1e-9
    path.write_text(json.dumps(record))
    assert reproduce.main(["toy/nearest/w4a8"]) == 1
    out = capsys.readouterr().out
    assert "psnr (value): committed" in out
    assert "These differ from their committed records, see above: toy/nearest/w4a8" in out


def test_a_cell_that_cannot_be_made_is_named_and_the_others_are_made(measured, capsys, monkeypatch):
    import baselines.tfmq

    def fail(*arguments):
        raise ValueError("no such luck")

    monkeypatch.setattr(
        baselines.tfmq,
        "METHOD",
        baselines.tfmq.METHOD.__class__("TFMQ-DM", "x", baselines.tfmq.METHOD.config, fail, lambda precision: ""),
    )
    assert reproduce.main(["toy/tfmq/w4a8", "toy/nearest/w4a8", "--shards", "1"]) == 1
    out = capsys.readouterr().out
    assert "toy/tfmq/w4a8 failed: no such luck" in out and "2 identical" in out
    assert "What is finished is kept in .resume/reproduce-" in out


def test_cells_that_do_not_fit_into_the_time_are_left_out_and_named(measured, capsys):
    assert reproduce.main(["toy/nearest/w4a8", "--shards", "1", "--minutes", "0.01"]) == 1
    out = capsys.readouterr().out
    assert "Left out for lack of time: toy/nearest/w4a8" in out
    assert "No quantised cell was compared: give more time" in out


def test_what_was_left_out_does_not_begin_anew(measured):
    assert reproduce.main(["toy/nearest/w4a8", "--shards", "1", "--minutes", "0.01"]) == 1
    (scratch,) = (measured / ".resume").glob("reproduce-*")
    record = "results/records/toy/full_precision/w32a32.json"
    made = (scratch / record).stat().st_mtime_ns
    assert reproduce.main(["toy/full_precision", "--shards", "1", "--keep", "kept"]) == 0
    assert (measured / "kept" / record).stat().st_mtime_ns == made


def test_random_cells_can_be_drawn_again(measured, capsys):
    assert reproduce.main(["toy/nearest", "--random", "1", "--shards", "1", "--minutes", "0.01"]) == 1
    (seed,) = re.findall(r"Drawn with --draw (\d+)\.", capsys.readouterr().out)
    assert 0 <= int(seed) < 10**6


def test_what_was_made_can_be_kept(measured, capsys):
    assert reproduce.main(["toy/nearest/w4a8", "--shards", "1", "--keep", "kept"]) == 0
    cell = files.cell_folder(Cell("toy", "nearest", "w4a8"))
    assert (measured / "kept" / cell / files.QUANTIZED).is_file()
    assert not (measured / "kept/data").exists() and (measured / "data/toy").is_dir()
    assert reproduce.main(["toy/nearest/w4a8", "--keep", "kept"]) == 1
    assert "error: --keep kept exists already: give a new folder" in capsys.readouterr().err


def test_an_earlier_run_can_be_compared_with(measured, capsys):
    assert reproduce.main(["toy/nearest/w4a8", "--shards", "1", "--keep", "before"]) == 0
    record = measured / "results/records/toy/nearest/w4a8.json"
    record.write_text(record.read_text().replace('"psnr"', '"of_another_processor"'))
    assert reproduce.main(["toy/nearest/w4a8", "--shards", "1", "--against", "before"]) == 0
    assert "2 identical, bit for bit" in capsys.readouterr().out
    assert reproduce.main(["toy/nearest/w4a8", "--shards", "1"]) == 1
    assert reproduce.main(["toy/nearest/w4a8", "--against", "data"]) == 1
    assert "error: --against data has no results/records" in capsys.readouterr().err


def test_results_are_carried_over_where_all_cells_are_identical(measured, capsys, monkeypatch):
    carried = []
    monkeypatch.setattr(carry_over, "check", carried.append)
    monkeypatch.setattr(carry_over, "carry_over", lambda root: carried.append(root) or 7)
    assert reproduce.main(["toy/nearest/w4a8", "--shards", "1", "--minutes", "0.01", "--carry-over"]) == 1
    assert "Nothing is carried over" in capsys.readouterr().out and carried == [Path()]
    assert reproduce.main(["toy/nearest/w4a8", "--shards", "1", "--carry-over"]) == 0
    assert "Carried over: dvc.lock has this code in 7 stages." in capsys.readouterr().out and carried[2] == measured


def test_mistakes_are_one_line_each(measured, capsys):
    for arguments, line in (
        (
            ["toy/nearest/w4a9"],
            "error: no cell, row or task is named 'toy/nearest/w4a9': did you mean 'toy/nearest/w4a8'",
        ),
        (["toy", "--minutes", "0"], "error: --minutes is 0.0, but has to be more than 0"),
        (["toy", "--draw", "1"], "error: --draw is the seed of --random: give that too"),
        (["--random", "-1"], "error: --random is -1, but has to be more than 0"),
    ):
        assert reproduce.main(arguments) == 1
        err = capsys.readouterr().err
        assert err.startswith(line) and err.count("\n") == 1
    (measured / "results/records/toy/nearest/w4a8.json").write_text("{")
    assert reproduce.main(["toy"]) == 1
    assert "w4a8.json cannot be read by this code" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", [0.3, 4.0, 9.0])
def test_ctrl_c_ends_it_with_one_line_and_the_next_run_works(measured, root, seconds):
    before = contents(measured)
    command = [sys.executable, "-m", "benchmarks.upkeep.reproduce", "toy/nearest", "toy/tfmq", "--shards", "2"]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}  # with what NumPy's BLAS is told here
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    if process.returncode == INTERRUPTED:
        assert err.strip() == STOPPED
    else:  # before the first line of the program
        assert seconds < 1
    assert {name: data for name, data in contents(measured).items() if not name.startswith(".resume")} == before
    done = subprocess.run(
        [*command[:3], "toy/nearest/w4a8"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
