"""A small DVC repository: work/ is cached and not in git, results/ is in git and not cached."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.report import tables
from benchmarks.upkeep import carry_over, freshness

PIPELINE = """
stages:
  generate:
    matrix: {method: "${methods}"}
    cmd: mkdir -p work && cp ${item.method}.txt work/${item.method}
    deps: ["${item.method}.txt"]
    params: ["methods.${item.method}"]
    outs:
    - work/${item.method}: {push: false}
  score:
    matrix: {method: "${methods}"}
    cmd: mkdir -p results/records/${item.method} && cp work/${item.method} results/records/${item.method}/w4a8.json
    deps: ["work/${item.method}"]
    outs:
    - results/records/${item.method}: {cache: false}
"""


def run(root, *command):
    subprocess.run(command, cwd=root, check=True, capture_output=True)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A repository with one method, whose results were made and whose caches are gone, as in a fresh clone."""
    root = tmp_path_factory.mktemp("repository")
    run(root, "git", "init", "-q")
    run(root, sys.executable, "-m", "dvc", "init", "-q")
    (root / ".gitignore").write_text("/work\n")
    (root / "params.yaml").write_text("methods:\n  nearest: {bits: 4}\n")
    (root / "nearest.txt").write_text("nearest\n")
    (root / "dvc.yaml").write_text(PIPELINE)
    (root / "README.md").write_text(f"{tables.START}\nthe table\n{tables.END}\n")
    run(root, sys.executable, "-m", "dvc", "repro", "-q")
    (root / "results" / "README.md").write_text("# Results\n\nthe table\n")
    shutil.rmtree(root / "work")
    shutil.rmtree(root / ".dvc" / "cache")
    return root


@pytest.fixture
def clone(measured, tmp_path):
    return shutil.copytree(measured, tmp_path / "clone")


def test_a_fresh_clone_is_fresh(clone, monkeypatch):
    assert freshness.find(clone) == []
    monkeypatch.chdir(clone)
    (clone / "nearest.txt").write_text("changed\n")
    assert freshness.find(Path()) == ["nearest.txt is modified since: generate@nearest"]


def test_every_change_is_named(clone):
    (clone / "params.yaml").write_text("methods:\n  nearest: {bits: 8}\n  tfmq: {}\n")
    (clone / "nearest.txt").write_text("changed\n")
    (clone / "tfmq.txt").write_text("new\n")
    (clone / "results" / "records" / "nearest" / "w4a8.json").write_text("edited by hand\n")
    (clone / "results" / "records" / "removed.json").write_text("of a method that is no more\n")
    (clone / "README.md").write_text(f"{tables.START}\nanother table\n{tables.END}\n")
    assert sorted(freshness.find(clone)) == [
        "README.md: the leaderboard is not that of results/README.md",
        "generate@tfmq was never run",
        "nearest.txt is modified since: generate@nearest",
        "params.yaml: methods.nearest is modified since: generate@nearest",
        "results/records/nearest is modified, but only its stage may write it: score@nearest",
        "results/records/removed.json is written by no stage: remove it",
        "score@tfmq was never run",
    ]


def test_another_suite_may_be_run_in_parts(clone):
    other = clone / "other"
    other.mkdir()
    (other / "dvc.yaml").write_text(PIPELINE)
    (other / "params.yaml").write_text("methods:\n  nearest: {bits: 4}\n  tfmq: {bits: 4}\n")
    (other / ".gitignore").write_text("/work\n")
    for name in ("nearest", "tfmq"):
        (other / f"{name}.txt").write_text(name)
    assert freshness.find(clone) == []
    run(other, sys.executable, "-m", "dvc", "repro", "-q", "generate@nearest")
    assert freshness.find(clone) == []
    for name in ("nearest", "tfmq"):
        (other / f"{name}.txt").write_text("changed")
    assert freshness.find(clone) == ["other/nearest.txt is modified since: other/dvc.yaml:generate@nearest"]


def test_a_deleted_source_or_record_is_stale_though_missing_caches_are_not(clone):
    (clone / "nearest.txt").unlink()
    shutil.rmtree(clone / "results" / "records" / "nearest")
    (clone / "dvc.yaml").write_text(PIPELINE.replace("mkdir -p work &&", "mkdir -p work;"))
    assert sorted(freshness.find(clone)) == [
        "changed command: generate@nearest",
        "nearest.txt is deleted since: generate@nearest",
        "results/records/nearest is deleted, but only its stage may write it: score@nearest",
    ]


def test_results_of_an_older_run_are_stale():
    lock = {
        "generate": {"outs": [{"path": "work/a", "md5": "new"}]},
        "score": {"deps": [{"path": "work/a", "md5": "old"}], "outs": []},
    }
    assert freshness.stale({}, lock, ["generate", "score"], str) == ["generate wrote work/a again since: score"]


def test_a_cause_is_one_line_however_many_stages_it_makes_stale():
    status = {f"generate@{n}": [{"changed deps": {"tfmq": "modified"}}] for n in range(5)}
    (line,) = freshness.stale(status, dict.fromkeys(status, {}), list(status), str)
    assert line == "tfmq is modified since: generate@0, generate@1, generate@2 and 2 more"


def test_before_the_first_run_nothing_is_stale(tmp_path):
    (line,) = freshness.find(tmp_path)
    assert line.startswith("there is no dvc.yaml in ")
    (tmp_path / "dvc.yaml").touch()
    assert freshness.find(tmp_path) == []
    (tmp_path / "results").mkdir()
    (line,) = freshness.find(tmp_path)
    assert "dvc.lock is not" in line


# -- carrying over ----------------------------------------------------------------------------------------------------


def test_results_are_carried_over_to_other_code_alone(clone):
    (clone / "code.py").write_text("moved = here\n")
    with pytest.raises(ValueError, match="nothing to carry over"):
        carry_over.check(clone)
    before = (clone / "dvc.lock").read_text()
    (clone / "dvc.yaml").write_text(PIPELINE.replace('"${item.method}.txt"]', '"${item.method}.txt", code.py]'))
    assert freshness.find(clone) == ["code.py is modified since: generate@nearest"]
    carry_over.check(clone)
    assert carry_over.carry_over(clone) == 2
    assert freshness.find(clone) == []
    kept = [line for line in before.splitlines() if "md5" in line and line not in (clone / "dvc.lock").read_text()]
    assert kept == [], "what work/ held is known by its hash alone, and that has to stay"


@pytest.mark.parametrize("changed", ["nearest.txt", "params.yaml", "dvc.yaml"])
def test_nothing_is_carried_over_to_other_data_settings_or_commands(clone, changed):
    text = (clone / changed).read_text()
    (clone / changed).write_text(text.replace("4", "8").replace("nearest\n", "changed\n").replace("cp ", "cp -p "))
    with pytest.raises(ValueError, match="only code of the other stages can be carried over"):
        carry_over.check(clone)
