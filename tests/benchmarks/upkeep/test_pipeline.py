"""dvc.yaml is what its description gives, and a stage depends on the code that it imports and on no other."""

from __future__ import annotations

import importlib

import pytest
import yaml

import baselines
from benchmarks.suite import params
from benchmarks.upkeep import pipeline
from benchmarks.upkeep.pipeline import PAPER, SMALL, Pipeline
from benchmarks.upkeep.stage import BYSTANDERS, code_of

METHOD = '''"""A method with a pass of its own."""

from dataclasses import dataclass

from baselines import Method, Settings, applies_always
from tfmq.passes import Pass
from tfmq.passes.weight_ranges import RoundToNearest, WeightRanges


@dataclass(frozen=True)
class Halve(Pass):
    def run(self, session, rows):
        pass


@dataclass(frozen=True)
class Config(Settings):
    def recipe(self):
        return Halve(), WeightRanges(), RoundToNearest()


METHOD = Method("Mine", "nowhere", Config, applies_always)
'''


@pytest.fixture
def stages(root):
    """Stage by name of the small suite."""
    return {stage.name: stage for stage in Pipeline(SMALL, params.load(root / "params.yaml")).stages()}


@pytest.mark.parametrize("folder", [SMALL, PAPER], ids=str)
def test_dvc_yaml_is_up_to_date(folder, root, monkeypatch):
    monkeypatch.chdir(root)
    text = pipeline.render(Pipeline(folder, params.load(folder / "params.yaml")))
    assert (folder / "dvc.yaml").read_text(encoding="utf-8") == text, "run `python -m benchmarks.upkeep.pipeline`"


def test_a_row_depends_on_the_passes_of_its_recipe_alone(stages):
    assert "tfmq/passes/block_reconstruction.py" in stages["generate_leaderboard_tfmq"].code
    assert "tfmq/passes/low_rank.py" in stages["generate_leaderboard_svdquant"].code
    for name in ("low_rank", "training", "step_network"):
        assert f"tfmq/passes/{name}.py" not in stages["generate_leaderboard_tfmq"].code
    nearest = stages["generate_leaderboard_nearest"].code
    assert {path for path in nearest if path.startswith("baselines")} == {
        "baselines/__init__.py",
        "baselines/nearest.py",
    }
    assert not any("reconstruction" in path for path in nearest)


def test_the_page_to_look_at_is_made_again_when_any_of_its_files_changes(stages, root):
    folder = root / "benchmarks" / "report" / "site"
    named = {path.relative_to(root).as_posix() for path in folder.iterdir() if path.is_file()}
    assert {f"{folder.relative_to(root).as_posix()}/page.{kind}" for kind in ("html", "css", "js", "py")} <= named
    assert named <= set(stages["tables"].code)
    assert "results/site" in stages["tables"].outs and "results/latency" in stages["tables"].deps


def test_a_new_method_with_a_pass_of_its_own_runs_its_own_cells_alone(root, tmp_path, monkeypatch, stages):
    """It is one file, and no other stage than its own, and those that look at all cells, changes."""
    (tmp_path / "mine.py").write_text(METHOD, encoding="utf-8")
    monkeypatch.setattr(baselines, "__path__", [*baselines.__path__, str(tmp_path)])
    monkeypatch.setattr(
        pipeline, "code_of", lambda *entries: code_of(*(e for e in entries if tmp_path not in e.parents))
    )
    importlib.invalidate_caches()
    settings = yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))
    settings["methods"]["mine"] = {}
    settings["tables"]["leaderboard"]["methods"].append("mine")
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    changed = {stage.name: stage for stage in Pipeline(SMALL, params.load(tmp_path / "params.yaml")).stages()}
    assert set(changed) - set(stages) == {"generate_leaderboard_mine"}
    looks = {f"temporal_{task}" for task in settings["temporal"]["tasks"]}
    assert {name for name in stages if changed[name] != stages[name]} <= {"tables", *looks}
    (made,) = changed["generate_leaderboard_mine"].outs
    assert made == "work/cells/${item}/mine"


def test_executed_cells_alone_depend_on_the_code_that_executes(root, tmp_path):
    settings = yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))
    table = {"protocol": "deployable", "backend": "executed", "precisions": ["w4a8"], "methods": ["tfmq"]}
    settings["tables"]["deployed"] = table | {"tasks": ["emoji-ldm4"]}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    stages = {stage.name: stage for stage in Pipeline(SMALL, params.load(tmp_path / "params.yaml")).stages()}
    executes = "tfmq/modules/integer_attention.py"
    with_it = {name for name, stage in stages.items() if executes in stage.code}
    assert with_it == {name for name in stages if name.startswith("generate_deployed_")} and with_it
    stage = stages["generate_deployed_tfmq"]
    assert list(stage.outs) == ["work/cells/${item}/tfmq-deployable-executed"]
    assert "tables.deployed.backend" in stage.params
    assert "tables.leaderboard.backend" not in stages["generate_leaderboard_tfmq"].params


def test_temporal_features_depend_on_the_cells_that_they_are_of_and_on_no_page(stages):
    stage = stages["temporal_emoji-ldm4"]
    cells = {path for path in stage.deps if path.startswith("work/")}
    assert {"work/cells/emoji-ldm4/tfmq/w8a8", "work/cells/emoji-ldm4/cache/w4a8"} <= cells
    assert not any("w4a32" in path or "-s1" in path or "-published" in path or "-executed" in path for path in cells)
    assert "work/cells/emoji-ldm8/cache/w4a8" not in stages["temporal_emoji-ldm8"].deps  # is of no table there
    assert not any(path.startswith(("benchmarks/report", "baselines")) for path in stage.code)
    tables = stages["tables"]
    assert "results/temporal" in tables.deps and "results/TEMPORAL.md" in tables.outs


def test_modules_that_decide_nothing_are_not_among_the_code(stages):
    for stage in stages.values():
        assert not set(stage.code) & set(BYSTANDERS), stage.name
    assert all((pipeline.ROOT / path).is_file() for path in BYSTANDERS)
