"""dvc.yaml and params.yaml agree with the files that they name."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from benchmarks import params


@pytest.fixture
def stages(root: Path) -> dict[str, dict]:
    return yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8"))["stages"]


@pytest.mark.parametrize("table", params.TABLES)
def test_a_row_depends_on_its_file_and_all_shared_recipes(root, stages, table):
    deps = stages[f"generate_{table}"]["deps"]
    recipes = {f"baselines/{path.name}" for path in (root / "baselines").glob("_*.py")}
    assert {dep for dep in deps if dep.startswith("baselines")} == recipes | {"baselines/${item.method}.py"}


@pytest.mark.parametrize("table", params.TABLES)
def test_a_row_depends_on_the_settings_and_cells_of_its_own_table(stages, table):
    for stage in ("generate", "score"):
        entry = stages[f"{stage}_{table}"]
        assert f"--table {table} " in entry["cmd"] and entry["cmd"].startswith(f"python -m benchmarks {stage} ")
        assert entry["matrix"] == {"task": f"${{tables.{table}.tasks}}", "method": f"${{tables.{table}.methods}}"}
        used = {name for name in entry["params"] if name.startswith("tables.")}
        assert used == {f"tables.{table}.{name}" for name in ("precisions", "protocol", "seeds")}
    (cells,) = stages[f"generate_{table}"]["outs"][0]
    assert cells in stages[f"score_{table}"]["deps"]
    assert cells.endswith("-published") == (table == "published")
    row = cells.removeprefix("work/cells/")
    outs = {name for out in stages[f"score_{table}"]["outs"] for name in out}
    assert outs == {f"results/records/{row}", f"work/scores/{row}"}


def test_pools_depend_on_the_seeds_of_all_tables(stages):
    used = stages["calibrate"]["do"]["params"]
    assert {f"tables.{table}.seeds" for table in params.TABLES} == {name for name in used if name.startswith("tables.")}


def test_other_dependencies_exist(root, stages):
    for name, stage in stages.items():
        for dep in stage.get("do", stage)["deps"]:
            if "$" not in dep and not dep.startswith(("work", "data", "results")):
                assert (root / dep).exists(), f"{name} depends on {dep}"


def test_the_suite_is_valid(root):
    suite = params.load(root / "params.yaml")
    assert set(suite.tables) == set(params.TABLES)
