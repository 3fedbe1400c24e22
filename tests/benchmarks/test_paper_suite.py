"""The paper suite from its downloads to its tables: tiny originals come from a server on this machine.

Nothing but sizes and addresses differs from the real run: the suite's own folder, sources, parameters, prompts and
command line.
"""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import yaml

from benchmarks import __main__ as command_line
from benchmarks.datasets import cifar10
from benchmarks.sources import catalogue
from benchmarks.sources.originals.architectures import TASKS
from benchmarks.suite.record import Record
from tests.benchmarks.loopback import Loopback
from tests.benchmarks.paper_suite import CIFAR_SIDE, CLIP, write_originals, write_sources, write_suite


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all files of catalogue.yaml."""
    folder = tmp_path_factory.mktemp("originals")
    write_originals(folder)
    return folder


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The suite's folder, cut down."""
    folder = tmp_path_factory.mktemp("suites") / "paper"
    write_suite(folder)
    return folder


@pytest.fixture
def run(suite: Path, originals: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run a stage in the suite's folder; its files come from a server that breaks off the first answer."""
    monkeypatch.chdir(suite)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(cifar10, "RECORDS", 1)
    monkeypatch.setattr(cifar10, "SIDE", CIFAR_SIDE)
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: CLIP)
    with Loopback(originals) as server:
        write_sources(Path(), server)
        server.drops = [1000]

        def stage(*arguments: str) -> str:
            code = command_line.main(list(arguments))
            printed = capsys.readouterr()
            assert code == 0, printed.err
            return printed.out

        yield stage


@pytest.mark.parametrize("task", TASKS)
def test_a_task_runs_from_its_download_to_its_table(suite, run, task):
    parameters = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    settings = parameters["tasks"][task]
    wanted = {"inception", task}
    if "statistics" in settings:
        wanted |= {
            name
            for name, source in catalogue.load(Path("sources.yaml")).items()
            if source.file in settings["statistics"]
        }
    if "clip" in settings:
        wanted |= {"clip-vocabulary", "clip-merges", "coco-captions", "open-clip-vit-b-32", "open-clip-vit-g-14"}
    for name in sorted(wanted):
        run("fetch", "--source", name)
        if name == "inception" or name.startswith("open-clip"):
            run("weights", "--source", name)
        if name == "coco-captions":
            run("prompts")
    run("convert", "--task", task)
    run("calibrate", "--task", task, "--shards", "1")
    run("reference", "--task", task, "--shards", "1")
    table = "published" if task in parameters["tables"]["published"]["tasks"] else "leaderboard"
    rows = [("full_precision", []), ("tfmq", ["--table", table])]
    for method, arguments in rows:
        for stage in ("generate", "score"):
            run(stage, "--task", task, "--method", method, *arguments, "--shards", "1")
    shown = run("tables")
    assert f"### {task}" in shown
    row = "tfmq-published" if table == "published" else "tfmq"
    record = Record.from_json(Path(f"results/records/{task}/{row}/w4a8.json").read_text(encoding="utf-8"))
    assert record.status == "measured"
    names = {"fd_data", "sfd_data", "is_score", "psnr", "temporal_error"}
    names |= {"clip_score", "clip_score_second"} if "clip" in settings else set()
    names |= {"fd_clean"} if "second_evaluator" in settings and "data" in settings else set()
    assert names <= set(record.metrics)
    assert record.settings["clip"] == [] or [name.split()[1] for name in record.settings["clip"]] == [
        "openai",
        "laion2b_s12b_b42k",
    ]
