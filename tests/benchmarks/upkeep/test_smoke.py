import copy

import pytest
import yaml

from benchmarks.stages import study
from benchmarks.suite import discover, params
from benchmarks.upkeep import smoke

METHODS = [name for name in discover.names(discover.METHODS) if name != "full_precision"]


@pytest.fixture
def document(task_settings):
    del task_settings["name"]
    table = {"protocol": "shared", "tasks": ["emoji-ldm4", "emoji-other"], "precisions": ["w8a8", "w4a8"]}
    return {
        "name": "small",
        "tasks": {"emoji-ldm4": task_settings, "emoji-other": task_settings | {"images": 2}},
        "tables": {
            "leaderboard": table | {"methods": METHODS},
            "published": table | {"protocol": "published", "methods": ["tfmq"], "tasks": ["emoji-other"]},
        },
        "methods": {name: {} for name in METHODS},
    }


def test_every_task_and_row_runs_once(document):
    before = copy.deepcopy(document)
    suite = params.parse(smoke.cut(document))
    assert document == before
    rows = [(task, method) for task in ("emoji-ldm4", "emoji-other") for method in METHODS]
    full = [("emoji-ldm4", "full_precision"), ("emoji-other", "full_precision")]
    assert [(cell.task, cell.row) for cell in suite.cells()] == [*full, *rows, ("emoji-other", "tfmq-published")]
    assert {cell.precision for cell in suite.cells()} == {"w32a32", "w4a8"}
    assert suite.tasks["emoji-ldm4"].images == 12
    assert suite.tasks["emoji-other"].images == 2
    assert suite.tasks["emoji-ldm4"].steps == 4
    assert suite.tasks["emoji-ldm4"].data_images == 64


def test_all_iterations_are_few(document):
    document["overrides"] = {"tfmq": {"emoji-other": {"iterations": 100, "batch": 8}}}
    cut = smoke.cut(document)
    assert cut["overrides"] == {"tfmq": {"emoji-other": {"iterations": smoke.ITERATIONS, "batch": 8}}}
    for name, settings in cut["methods"].items():
        config = discover.method(name).config(**settings)
        iterations = {key: value for key, value in vars(config).items() if key.endswith("iterations")}
        assert set(iterations.values()) <= {0, smoke.ITERATIONS}, name


def test_the_suite_of_this_repository_can_be_cut(root):
    document = yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))
    full, small = params.parse(document), params.parse(smoke.cut(document))
    assert list(small.tasks) == list(full.tasks)
    assert {(cell.task, cell.row) for cell in small.cells()} == {(cell.task, cell.row) for cell in full.cells()}
    assert small.study.curves.keys() == full.study.curves.keys()
    points = study.points(small.study, *small.study.tasks)
    assert [point.curve for point in points] == [*small.study.curves] and {point.precision for point in points} == {
        smoke.PRECISION
    }
    for point in points:
        config = discover.method(point.method).config(
            **small.settings(*small.study.tasks, point.method) | point.settings
        )
        iterations = {value for name, value in vars(config).items() if name.endswith("iterations")}
        assert iterations <= {0, smoke.ITERATIONS}, point.curve


def test_each_method_of_a_table_runs_on_one_of_its_tasks(document):
    suite = params.parse(smoke.cut(document))
    cells = smoke.chosen(suite)
    assert [cell.task for cell in cells if cell.method == "full_precision"] == list(suite.tasks)
    rows = [cell for cell in cells if cell.method != "full_precision" and cell.protocol == "shared"]
    assert [(cell.task, cell.method) for cell in sorted(rows, key=lambda cell: METHODS.index(cell.method))] == [
        (("emoji-ldm4", "emoji-other")[index % 2], method) for index, method in enumerate(METHODS)
    ]
    assert [cell.name for cell in cells if cell.protocol == "published"] == ["emoji-other/tfmq-published/w4a8"]


def test_dvc_runs_a_row_of_each_table(document):
    assert smoke.targets(params.parse(document)) == [
        f"score_leaderboard@emoji-ldm4-{METHODS[0]}",
        "score_published@emoji-other-tfmq",
    ]


def test_what_this_machine_cannot_execute_is_left_out(document, monkeypatch):
    deployed = {"protocol": "deployable", "backend": "executed", "tasks": ["emoji-other"], "methods": ["nearest"]}
    document["tables"]["deployed"] = {"precisions": ["w4a8"]} | deployed
    suite = params.parse(smoke.cut(document))
    monkeypatch.setattr("tfmq.execution.cpu_is_exact", lambda: True)
    assert smoke.left_out(suite, "cpu") == {}
    monkeypatch.setattr("tfmq.execution.cpu_is_exact", lambda: False)
    without = smoke.left_out(suite, "cpu")
    assert without.keys() == {"deployed"} and "VNNI" in without["deployed"]
    executed = {cell for cell in smoke.chosen(suite) if cell.backend == "executed"}
    assert len(executed) == 1 and {*smoke.chosen(suite)} - {*smoke.chosen(suite, without)} == executed
    assert {*smoke.targets(suite)} - {*smoke.targets(suite, without)} == {"score_deployed@emoji-other-nearest"}


def test_what_a_run_lacks_is_listed(document, make_record, tmp_path):
    small = smoke.cut(document)
    del small["tasks"]["emoji-other"], small["tables"]["published"]
    small["tables"]["leaderboard"] |= {"tasks": ["emoji-ldm4"], "methods": ["nearest"]}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(small))
    records = tmp_path / "results" / "records" / "emoji-ldm4"
    for row in ("nearest", "full_precision"):
        (records / row).mkdir(parents=True)
    failed = make_record(status="failed", reason="out of memory", metrics={}, cost=None)
    (records / "nearest" / "w4a8.json").write_text(failed.to_json())
    assert smoke.problems(tmp_path) == [
        *(f"{page} is missing" for page in smoke.PAGES),
        "results/records/emoji-ldm4/full_precision/w32a32.json is missing",
        "emoji-ldm4/nearest/w4a8 failed: out of memory",
    ]
    (records / "nearest" / "w4a8.json").write_text(make_record().to_json())
    full = make_record(method="full_precision", precision="w32a32", kid=None)
    (records / "full_precision" / "w32a32.json").write_text(full.to_json())
    for page in smoke.PAGES:
        (tmp_path / page).write_text("")
    assert smoke.problems(tmp_path) == []
