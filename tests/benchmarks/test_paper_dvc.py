"""The paper suite's dvc.yaml, by DVC itself: a row of tiny originals from its downloads to its record."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks.suite.record import Record
from tests.benchmarks.loopback import Loopback
from tests.benchmarks.paper_suite import write_originals, write_sources, write_suite

TASK = "lsun-bedrooms-ldm4"
ROW = f"score_published@{TASK}-tfmq"
SOURCES = (TASK, "adm-lsun-bedroom256", "inception")


@pytest.fixture
def suite(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the suite in a copy of the repository, whose own code runs."""
    copy = tmp_path / "repository"
    for name in ("tfmq", "baselines", "benchmarks"):
        shutil.copytree(root / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "paper"))
    (copy / ".dvc").mkdir()
    for name in (".dvc/config", ".dvc/.gitignore", ".dvcignore", ".gitignore", "data.dvc", "dvc.yaml", "params.yaml"):
        shutil.copy(root / name, copy / name)
    write_suite(copy / "benchmarks" / "paper")
    subprocess.run(["git", "init", "-q"], cwd=copy, check=True)
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(copy))
    monkeypatch.setenv("TFMQ_BENCH_DEVICE", "cpu")
    return copy / "benchmarks" / "paper"


def repro(suite: Path, *arguments: str) -> tuple[set[str], str]:
    """Reproduce the row; returns the stages that ran, or would in a dry run, and all that was printed."""
    command = [sys.executable, "-m", "dvc", "repro", *arguments, ROW]
    done = subprocess.run(command, cwd=suite, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return set(re.findall(r"Running stage '(.+)':", done.stdout)), done.stdout


def test_a_row_is_reproduced_and_only_what_changed_again(suite, tmp_path):
    originals = tmp_path / "originals"
    originals.mkdir()
    write_originals(originals, SOURCES)
    with Loopback(originals) as server:
        write_sources(suite, server)
        server.drops = [1000]
        ran, _ = repro(suite)
    of_task = ("convert", "calibrate", "reference", "full_precision", "score_full_precision")
    fetched = {f"fetch@{name}" for name in SOURCES}
    row = {f"generate_published_tfmq@{TASK}", ROW}
    assert ran == fetched | {"weights@inception"} | {f"{stage}@{TASK}" for stage in of_task} | row
    assert len(server.asked) == len(SOURCES) + 1
    record = suite / "results" / "records" / TASK / "tfmq-published" / "w4a8.json"
    assert Record.from_json(record.read_text(encoding="utf-8")).status == "measured"

    ran, printed = repro(suite)
    assert not ran and "up to date" in printed

    settings = yaml.safe_load((suite / "params.yaml").read_text(encoding="utf-8"))
    settings["methods"]["tfmq"]["iterations"] += 1
    (suite / "params.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    ran, _ = repro(suite, "--dry")
    assert ran and ran <= row


def test_what_a_killed_stage_leaves_is_no_part_of_its_output(suite):
    left = [f"{folder}/.{TASK}.123/file" for folder in ("data", "data/clip", "work/cells/a", "results/records")]
    command = [sys.executable, "-m", "dvc", "check-ignore", *left, "work/cells/a/file"]
    assert subprocess.run(command, cwd=suite, stdout=subprocess.PIPE, text=True).stdout.split() == left
