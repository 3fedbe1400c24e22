"""`dvc repro` of everything is followed from what DVC prints."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.suite import params
from benchmarks.upkeep import INTERRUPTED, STOPPED, everything
from benchmarks.upkeep.reproduce import read_records


@pytest.fixture
def dvc(tmp_path, monkeypatch):
    """Stands in for DVC: a script that writes records and prints as DVC does."""

    def stand_in(script: str) -> None:
        path = tmp_path / "dvc.py"
        path.write_text(f"import shutil, sys, time\n{script}")
        monkeypatch.setattr(everything, "REPRO", (sys.executable, "-u", str(path)))

    return stand_in


@pytest.fixture
def measured(suite, generate, score):
    """The tiny suite with the records of one row, which stand-ins of DVC bring back from `made`."""
    assert generate("nearest") == (0, [])
    score("nearest")
    shutil.move("results/records/toy/nearest", "made")
    return suite


def test_every_stage_of_the_pipeline_has_an_expected_time(root, monkeypatch):
    monkeypatch.chdir(root)
    suite = params.load(Path("params.yaml"))
    listed = [sys.executable, "-m", "dvc", "stage", "list", "--name-only"]
    names = subprocess.run(listed, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
    expected = everything.expected(suite, read_records(suite, root), 2)
    assert set(expected) == set(names)
    order = everything.in_order(suite)
    assert sorted(order) == sorted(names)
    row = order.index("generate_leaderboard_tfmq@emoji-ldm4")
    assert order[row + 1] == "score_leaderboard@emoji-ldm4-tfmq"
    before = [f"{stage}@emoji-ldm4" for stage in ("calibrate", "reference", "full_precision", "score_full_precision")]
    first = order.index(before[0])
    assert order[first : first + 4] == before and first + 4 <= row
    assert min(expected.values()) >= everything.START_SECONDS


def test_cells_are_shown_when_their_stage_ends_and_unchanged_ones_are_counted(measured, dvc, capsys):
    dvc(
        "print(\"Stage 'score_full_precision@toy' didn't change, skipping\")\n"
        "print(\"Running stage 'score_leaderboard@toy-nearest':\\n> python -m benchmarks score\")\n"
        "shutil.copytree('made', 'results/records/toy/nearest')\n"
        "print('Updating lock file')\n"
        "print(\"Running stage 'tables':\")\n"
    )
    assert everything.main([]) == 0
    out = capsys.readouterr().out
    assert "2/8    toy/nearest/w4a8 " in out and "3/8    toy/nearest/w4a32" in out
    assert "no committed record" in out and "> python" not in out and "Updating" not in out
    assert "2 cells made in 5 s, 0 differ from the last commit." in out


def test_a_failing_stage_is_named_with_what_it_printed_and_tables_are_made_all_the_same(measured, dvc, capsys):
    dvc(
        "print(\"Running stage 'score_leaderboard@toy-nearest':\")\n"
        "print('toy/nearest/w4a8: no such luck')\n"
        "print(\"ERROR: failed to reproduce 'score_leaderboard@toy-nearest'\")\n"
        "print(\"Running stage 'tables':\")\n"
        "sys.exit(1)\n"
    )
    assert everything.main([]) == 1
    out = capsys.readouterr().out
    assert "no such luck\nERROR: failed to reproduce" in out and "0 cells made" in out


def test_ctrl_c_leaves_no_process_and_no_broken_lock(measured, dvc, root):
    script = (
        "import os, subprocess\nchild = subprocess.Popen(['sleep', '60'])\nopen('dvc.lock', 'w').write('stages: [')\n"
        "open('begun.tmp', 'w').write(str(child.pid))\nos.rename('begun.tmp', 'begun')\ntime.sleep(60)\n"
    )
    (measured / "dvc.lock").write_text("stages: {}\n")
    dvc(script)
    code = (
        "import sys; from benchmarks.upkeep import INTERRUPTED, STOPPED, everything;"
        f" everything.REPRO = {everything.REPRO!r}; sys.exit(everything.main([]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    while not (measured / "begun").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == INTERRUPTED
    assert err.strip() == STOPPED
    child = int((measured / "begun").read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
    assert (measured / "dvc.lock").read_text() == "stages: {}\n"  # and not what it was cut off in
