"""The dvc.yaml and params.yaml of each suite agree with each other and with the files that they name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from benchmarks.sources import catalogue
from benchmarks.suite import params, sections
from benchmarks.suite.record import SIMULATED, Cell
from tfmq.closure import closure

ROOT = Path(__file__).parents[1]
SUITES = {suite: params.load(ROOT / suite / "params.yaml") for suite in (".", "benchmarks/paper")}
TABLES = {suite: tuple(found.tables) for suite, found in SUITES.items()}
TABLES_OF_SUITES = [(suite, table) for suite, tables in TABLES.items() for table in tables]
# What a suite's stages make, and what users bring.
MADE = ("work", "data", "results", "downloads", "images")
PAPER = "benchmarks/paper"
PURPOSES = ("calibration", "evaluation")


def definition(root: Path, suite: str) -> dict[str, dict]:
    return yaml.safe_load((root / suite / "dvc.yaml").read_text(encoding="utf-8"))


def dependencies(root: Path, suite: str, stage: dict) -> Iterator[str]:
    """Of a stage, as paths from the repository's root; what it makes itself keeps its name."""
    for dep in stage.get("do", stage).get("deps", []):
        yield os.path.normpath(Path(suite) / dep) if dep.startswith("..") else dep


@pytest.mark.parametrize(("suite", "table"), TABLES_OF_SUITES)
def test_a_row_depends_on_its_file_and_the_recipes_that_it_shares(root, suite, table):
    stages, found = definition(root, suite)["stages"], params.load(root / suite / "params.yaml")
    methods = found.tables[table].methods
    assert {name for name in stages if name.startswith(f"generate_{table}_")} == {
        f"generate_{table}_{method}" for method in methods
    }
    for method in methods:
        deps = set(dependencies(root, suite, stages[f"generate_{table}_{method}"]))
        imported = {path.relative_to(root).as_posix() for path in closure(root / "baselines" / f"{method}.py")}
        assert imported <= deps, method
        own = {dep for dep in deps if dep.startswith("baselines")}
        assert own == {path for path in imported if path.startswith("baselines")}, method
        others = own - {"baselines/__init__.py", f"baselines/{method}.py"}
        assert all(Path(path).name.startswith("_") for path in others), "no row depends on another one"


@pytest.mark.parametrize(("suite", "table"), TABLES_OF_SUITES)
def test_a_row_depends_on_the_settings_and_cells_of_its_own_table(root, suite, table):
    stages, found = definition(root, suite)["stages"], params.load(root / suite / "params.yaml")
    rows = {f"generate_{table}_{method}": method for method in found.tables[table].methods}
    for name in (*rows, f"score_{table}"):
        entry = stages[name]
        command = entry.get("do", entry)
        assert f"--table {table} " in command["cmd"]
        assert command["cmd"].startswith(f"python -m benchmarks {name.split('_')[0]} ")
        used = {param for param in command["params"] if param.startswith("tables.")}
        backend = ["backend"] * (found.tables[table].backend != SIMULATED)
        assert used == {f"tables.{table}.{param}" for param in ("precisions", "protocol", "seeds", *backend)}
        if name in rows:
            assert entry["foreach"] == f"${{tables.{table}.tasks}}"
            assert command["cmd"].endswith(f" --task ${{item}} --method {rows[name]}")
            assert {f"methods.{rows[name]}", "tasks.${item}"} <= set(command["params"])
            overridden = {param for param in command["params"] if param.startswith("overrides.")}
            assert overridden == {f"overrides.{method}" for method in found.overrides if method == rows[name]}
    score = stages[f"score_{table}"]
    assert score["matrix"] == {"task": f"${{tables.{table}.tasks}}", "method": f"${{tables.{table}.methods}}"}
    where = found.tables[table]
    suffix = Cell("", "", "", protocol=where.protocol, backend=where.backend).row
    for name, method in rows.items():
        (cells,) = stages[name]["do"]["outs"][0]
        assert cells == f"work/cells/${{item}}/{method}{suffix}"
    row = f"${{item.task}}/${{item.method}}{suffix}"
    assert f"work/cells/{row}" in score["deps"]
    outs = {name for out in score["outs"] for name in out}
    assert outs == {f"results/records/{row}"}


@pytest.mark.parametrize("suite", TABLES)
def test_stages_of_one_name_depend_on_the_same_in_both_suites(root, suite):
    stages, of_small = definition(root, suite)["stages"], definition(root, ".")["stages"]
    for name in ("calibrate", "full_precision", "score_full_precision", *(f"score_{table}" for table in TABLES[suite])):
        code = [
            {dep for dep in dependencies(root, where, found[name]) if dep.endswith(".py") or dep.startswith("tfmq")}
            for where, found in ((suite, stages), (".", of_small))
        ]
        assert code[0] == code[1], name


@pytest.mark.parametrize("suite", TABLES)
def test_pools_depend_on_the_seeds_of_all_tables(root, suite):
    used = definition(root, suite)["stages"]["calibrate"]["do"]["params"]
    wanted = {f"tables.{name}.seeds" for name, table in SUITES[suite].tables.items() if table.seeds}
    assert wanted == {name for name in used if name.startswith("tables.")}


@pytest.mark.parametrize("suite", TABLES)
def test_other_dependencies_exist(root, suite):
    for name, stage in definition(root, suite)["stages"].items():
        for dep in dependencies(root, suite, stage):
            if "$" not in dep and not dep.startswith(MADE):
                there = root / dep if dep.startswith(("benchmarks", "tfmq", "baselines")) else root / suite / dep
                assert there.exists(), f"{name} depends on {dep}"


@pytest.mark.parametrize("suite", TABLES)
def test_the_suite_is_valid(root, suite):
    found = params.load(root / suite / "params.yaml")
    assert set(found.tables) <= set(sections.TABLES)
    params.check_methods(found)


def test_the_files_of_the_papers_tasks_are_those_of_their_settings(root):
    document = definition(root, PAPER)
    suite, (variables,) = params.load(root / PAPER / "params.yaml"), document["vars"]
    assert list(variables["inputs"]) == list(suite.tasks)
    known = catalogue.load(root / PAPER / "sources.yaml")
    assert document["stages"]["fetch"]["foreach"] == {name: source.file for name, source in known.items()}
    for name, inputs in variables["inputs"].items():
        task = suite.tasks[name]
        nothing = ["prompts/nothing"] * 2
        prompts = nothing if task.prompts is None else [f"{task.prompts}/{purpose}.txt" for purpose in PURPOSES]
        assert inputs["family"] == task.family
        assert inputs["original"] == f"downloads/{known[name].file}"
        assert inputs["data"] == (task.data or task.statistics)
        assert [inputs["calibration_prompts"], inputs["evaluation_prompts"]] == prompts
        assert [inputs["clip"], inputs["second_clip"]] == (list(task.clip) or nothing)
