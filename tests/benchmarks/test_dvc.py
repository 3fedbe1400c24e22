"""What a user of DVC expects: its metrics, plots and settings of experiments are those of the suite."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from dvc.utils.hydra import apply_overrides

from benchmarks.suite import params
from benchmarks.upkeep.pipeline import SMALL, Pipeline, render
from tests.benchmarks.tiny_suite import generate, prepared, run, score, suite

__all__ = ["generate", "prepared", "run", "score", "suite"]


def test_a_setting_of_one_method_changes_that_method_alone(root, tmp_path):
    """As `dvc exp run -S` writes it; behind an anchor of YAML it would be lost without a word."""
    path = tmp_path / "params.yaml"
    shutil.copy(root / "params.yaml", path)
    before = yaml.safe_load(path.read_text(encoding="utf-8"))
    settings = {name: found for name, found in before["methods"].items() if found}
    names = {name: next(iter(found)) for name, found in settings.items()}
    apply_overrides(str(path), [f"methods.{name}.{setting}=7" for name, setting in names.items()])
    after = yaml.safe_load(path.read_text(encoding="utf-8"))
    expected = {name: found | ({names[name]: 7} if name in names else {}) for name, found in before["methods"].items()}
    assert after == before | {"methods": expected}
    apply_overrides(str(path), ["methods.tfmq.iterations=100"])
    assert yaml.safe_load(path.read_text(encoding="utf-8"))["methods"]["tiar"] == after["methods"]["tiar"]


@pytest.fixture
def dvc(suite, monkeypatch):
    """DVC's command line in the tiny suite, a repository with the pipeline that is generated for it."""
    document = yaml.safe_load(Path("params.yaml").read_text())
    del document["tables"]["published"], document["tables"]["variants"]
    Path("params.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    Path("dvc.yaml").write_text(render(Pipeline(SMALL, params.load(Path("params.yaml")))))
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(suite / "site"))
    Path(".gitignore").write_text("/data\n/work\n/site\n/.resume\n/dvc_plots\n")

    def command(*arguments: str) -> str:
        environment = os.environ | {"GIT_CONFIG_GLOBAL": os.devnull}
        done = subprocess.run(arguments, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    command("git", "init", "-q")
    command(sys.executable, "-m", "dvc", "init", "-q")
    command("git", "config", "user.email", "someone@example.com")
    command("git", "config", "user.name", "someone")
    return command


def test_metrics_and_plots_of_dvc_are_those_of_the_tables(dvc, run, generate, score):
    tool = (sys.executable, "-m", "dvc")
    for method in ("nearest", "tfmq"):
        assert generate(method) == (0, [])
        records = score(method)
    assert run("tables") == (0, [])
    dvc("git", "add", "-A")
    dvc("git", "commit", "-q", "-m", "results")
    found = json.loads(dvc(*tool, "metrics", "show", "--json"))[""]["data"]
    assert set(found) == {f"results/metrics/leaderboard/{name}.json" for name in ("nearest", "tfmq")}
    shown = found["results/metrics/leaderboard/tfmq.json"]["data"]["feature_distance"]
    assert shown == {name: pytest.approx(record.metrics["feature_distance"].value) for name, record in records.items()}

    path = Path("results/metrics/leaderboard/tfmq.json")
    path.write_text(json.dumps({"feature_distance": shown | {"w4a8": shown["w4a8"] + 1}}))
    assert set(json.loads(dvc(*tool, "metrics", "diff", "--json"))) == {path.as_posix()}
    dvc(*tool, "plots", "show")
    page = Path("dvc_plots/index.html").read_text()
    assert "Feature distance to full precision, w4a8" in page and "Temporal error, toy, w4a8" in page
