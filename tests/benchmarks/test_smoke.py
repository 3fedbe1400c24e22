import copy

import pytest
import yaml

from benchmarks import discover, params, smoke

METHODS = [name for name in discover.names(discover.METHODS) if name != "full_precision"]


@pytest.fixture
def document(task_settings):
    del task_settings["name"]
    return {
        "name": "small",
        "protocol": "shared",
        "threads": 2,
        "tasks": {"emoji-ldm4": task_settings, "emoji-other": task_settings | {"images": 2}},
        "methods": {name: {} for name in METHODS},
        "precisions": ["w8a8", "w4a8"],
        "seeds": [0, 1],
    }


def test_every_task_and_method_runs_once(document):
    before = copy.deepcopy(document)
    suite = params.parse(smoke.cut(document))
    assert document == before
    names = ["full_precision", *METHODS]
    assert [(cell.task, cell.method) for cell in suite.cells()] == [
        (task, method) for task in ("emoji-ldm4", "emoji-other") for method in names
    ]
    assert {cell.precision for cell in suite.cells()} == {"w32a32", "w4a8"}
    assert suite.tasks["emoji-ldm4"].images == 12
    assert suite.tasks["emoji-other"].images == 2
    assert suite.tasks["emoji-ldm4"].steps == 4
    assert suite.tasks["emoji-ldm4"].data_images == 64


def test_all_iterations_are_few(document):
    for name, settings in smoke.cut(document)["methods"].items():
        config = discover.method(name).config(**settings)
        iterations = {key: value for key, value in vars(config).items() if "iterations" in key}
        assert set(iterations.values()) <= {smoke.ITERATIONS}, name


def test_the_suite_of_this_repository_can_be_cut(root):
    document = yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))
    full, small = params.parse(document), params.parse(smoke.cut(document))
    assert list(small.tasks) == list(full.tasks)
    assert list(small.methods) == list(full.methods)


def test_what_a_run_lacks_is_listed(document, make_record, tmp_path):
    small = smoke.cut(document)
    del small["tasks"]["emoji-other"]
    small["methods"] = {"nearest": {}}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(small))
    records = tmp_path / "results" / "records"
    records.mkdir(parents=True)
    failed = make_record(status="failed", reason="out of memory", metrics={}, cost=None)
    (records / "emoji-ldm4-nearest-w4a8.json").write_text(failed.to_json())
    assert smoke.problems(tmp_path) == [
        "results/README.md is missing",
        "results/leaderboard.csv is missing",
        "results/records/emoji-ldm4-full_precision-w32a32.json is missing",
        "emoji-ldm4-nearest-w4a8 failed: out of memory",
    ]
    (records / "emoji-ldm4-nearest-w4a8.json").write_text(make_record().to_json())
    full = make_record(method="full_precision", precision="w32a32", kid=None)
    (records / "emoji-ldm4-full_precision-w32a32.json").write_text(full.to_json())
    for table in smoke.TABLES:
        (tmp_path / table).write_text("")
    assert smoke.problems(tmp_path) == []
