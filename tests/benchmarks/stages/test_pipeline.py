"""From cells to tables on the tiny suite; and what adding a method takes."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

import baselines
from benchmarks.metrics import metrics
from benchmarks.report import tables
from benchmarks.runtime import excerpt, files

DUMMY = '''
"""A method in one file, with a pass of its own: round to nearest in narrower ranges, with per-step ranges."""

from dataclasses import dataclass

from baselines import Method, Settings, applies_always
from tfmq.network.calibration import Spaced
from tfmq.passes import Cost, Pass
from tfmq.passes.activation_ranges import ActivationRanges
from tfmq.passes.weight_ranges import RoundToNearest, WeightRanges
from tfmq.plan import quantized_layers


@dataclass(frozen=True)
class NarrowerRanges(Pass):
    share: float

    sees_activations = False

    def run(self, session, rows):
        for path, layer in quantized_layers(session.network).items():

            def learn(layer=layer):
                layer.weight_scale = self.share * layer.weight_scale
                return [0.0]

            def learned(layer=layer):
                return {"scale": layer.weight_scale}

            def restore(tensors, layer=layer):
                layer.weight_scale = tensors["scale"]

            session.learn(path, learn, learned, restore)

    def cost(self, shapes, rows):
        return Cost(optimizer_steps=len(shapes.plan.layers))


@dataclass(frozen=True)
class Config(Settings):
    images: int = 2
    share: float = 0.9

    def recipe(self):
        ranges = ActivationRanges(Spaced(None, self.images), per_step=True)
        return WeightRanges("minmax"), NarrowerRanges(self.share), RoundToNearest(), ranges


METHOD = Method("Dummy", "a test", Config, applies_always)
'''
PAGES = ("README.md", "METHODS.md", "COVERAGE.md", "FINDINGS.md", "RANKING.md", "cells.csv")


def test_records_and_tables_come_from_the_cells(suite, run, generate, score):
    full = score("full_precision")["w32a32"]
    assert "kid_fp" in full.metrics and "feature_distance" not in full.metrics
    rows = (("nearest", "leaderboard"), ("tfmq", "leaderboard"), ("temporal_feature_matters", "variants"))
    for method, table in rows:
        assert generate(method, table=table) == (0, [])
        records = score(method, table=table)
        assert set(records) == ({"w4a8", "w4a32"} if table == "leaderboard" else {"w4a8"})
        for precision, record in records.items():
            assert record.status == "measured" and record.metrics["psnr"].n == 6
            assert record.cost.unet_evaluations >= 12 and record.cost.seconds["calibrate"] > 0
            phases = list(record.cost.seconds)
            assert phases[:2] == ["calibrate", "weight ranges"] and phases[-1] == "sample"
            assert ("block reconstruction" in phases) == (method != "nearest")
            assert record.coverage["layers"]["conv2d w8a8" if precision == "w4a8" else "conv2d w8a32"] == 2
            assert ("cached" in record.details) == (table == "variants")
    for method in ("tfmq", "nearest"):
        assert generate(method, table="published") == (0, [])
        score(method, table="published")
    assert run("tables") == (0, [])
    cells = pd.read_csv("results/cells.csv")
    assert len(cells) == 8 and cells["kid_fp"].notna().sum() == 7
    assert cells["table"].fillna("").tolist() == ["", *["leaderboard"] * 4, "variants", *["published"] * 2]
    page = Path("results/README.md").read_text()
    for part in ("## Leaderboard", "## Variants", "## Published", "TFMQ-DM", "not applicable: no choice of layers"):
        assert part in page
    assert "TFMQ-DM" in Path("README.md").read_text()
    assert "TFMQ-DM (published)" in Path("results/COVERAGE.md").read_text()
    figures = sorted(path.name for path in Path("results/figures").iterdir())
    shown = ("variants-w4a8", "leaderboard-w4a32", "leaderboard-w4a8", "published-w4a8")
    drawn = [f"toy-{name}-{kind}.png" for name in shown for kind in ("samples", "temporal")]
    assert figures == sorted([*drawn, "toy-intervals.png", "toy-temporal_feature_matters-w4a8-selection.png"])
    assert all(f"(figures/{name})" in page for name in figures)
    look = Path("results/site/index.html").read_text()
    assert all(f'id="cell:{cell}"' in look for cell in ("toy/tfmq/w4a8", "toy/nearest-published/w4a8"))
    assert "(site/index.html)" in page
    before = {path: path.read_bytes() for path in Path("results").rglob("*.*")}
    assert run("tables") == (0, [])
    assert before == {path: path.read_bytes() for path in Path("results").rglob("*.*")}


def test_a_cell_without_a_record_stays_visible(suite, run):
    assert run("tables") == (0, [])
    assert Path("results/README.md").read_text().count("no record; run `dvc repro`") >= 7


def test_pages_are_made_of_results_alone(suite, run, generate, score):
    for method in ("nearest", "tfmq"):
        generate(method, "w4a8")
        score(method, "w4a8")
    assert run("tables") == (0, [])
    before = {path: path.read_bytes() for path in Path("results").rglob("*.*")}
    shutil.rmtree("work")
    for path in (Path("results") / name for name in ("README.md", "FINDINGS.md", "figures/toy-intervals.png")):
        path.unlink()
    assert run("tables") == (0, [])
    assert before == {path: path.read_bytes() for path in Path("results").rglob("*.*")}


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-30])])
def test_a_record_without_its_excerpt_is_not_shown_as_measured(suite, run, generate, score, damage):
    generate("nearest", "w4a8")
    score("nearest", "w4a8")
    damage(Path("results/records/toy/nearest/w4a8.npz"))
    assert run("tables") == (0, [])
    assert "failed: what pages show beside its record is missing" in Path("results/README.md").read_text()


def test_an_excerpt_of_other_images_is_not_shown(suite, run, generate, score):
    for method in ("nearest", "tfmq"):
        generate(method, "w4a8")
        score(method, "w4a8")
    shutil.copy("results/records/toy/nearest/w4a8.npz", "results/records/toy/tfmq/w4a8.npz")
    assert run("tables") == (0, [])
    assert "failed: what pages show beside its record" in Path("results/README.md").read_text()


def test_the_values_of_images_are_kept_for_comparing_rows(suite, run, generate, score):
    for method in ("nearest", "tfmq"):
        generate(method, "w4a8")
        record = score(method, "w4a8")["w4a8"]
        values = excerpt.read(record.cell).values
        means = {name for name, metric in metrics().items() if metric.per_image is not None}
        assert set(values) == means & set(record.metrics) >= {"feature_distance", "psnr", "noise_error", "perceptual"}
        for name, array in values.items():
            expected = record.metrics[name]
            assert array.shape == (expected.n,) and array.mean() == pytest.approx(expected.value)
    assert run("tables") == (0, [])
    page = Path("results/FINDINGS.md").read_text()
    assert "PTQ4DM" not in page and "yet" in page


def test_a_cell_that_was_not_measured_has_no_excerpt(suite, generate, score):
    generate("nearest", table="published")
    assert score("nearest", table="published")["w4a8"].status == "not applicable"
    assert not Path("results/records/toy/nearest-published/w4a8.npz").exists()


def test_tasks_and_seeds_are_summarised(suite, run, generate, score):
    document = yaml.safe_load(Path("params.yaml").read_text())
    document["tables"]["leaderboard"] |= {"precisions": ["w4a8"], "seeds": {"w4a8": 2}}
    Path("params.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    assert run("calibrate", "--task", "toy") == (0, [])
    for method in ("nearest", "tfmq"):
        assert generate(method) == (0, [])
        assert set(score(method)) == {"w4a8", "w4a8-s1"}
    # A second task with the same cells.
    document["tasks"]["twin"] = document["tasks"]["toy"]
    document["tables"]["leaderboard"]["tasks"].append("twin")
    Path("params.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    for folder in ("work/cells", "results/records"):
        shutil.copytree(f"{folder}/toy", f"{folder}/twin")
    for path in Path("results/records/twin").rglob("*.json"):
        record = json.loads(path.read_text())
        record["task"] = record["settings"]["task"]["name"] = "twin"
        path.write_text(json.dumps(record))
    assert run("tables") == (0, [])
    page = Path("results/README.md").read_text()
    assert "## Leaderboard\n\n### Across tasks\n\nDeviation on each task" in page
    assert "Over 2 seeds" in page and "(figures/across-tasks.png)" in page
    summary = tables.region(Path("README.md").read_text())
    assert summary.startswith("The best methods at each precision") and f"## Summary\n\n{summary}\n" in page
    cells = pd.read_csv("results/cells.csv")
    assert (cells["seed"] == 1).sum() == 4
    ranks = cells.dropna(subset="rank").groupby(["task", "method"])["rank"].nunique()
    assert (ranks == 1).all() and len(ranks) == 4
    assert "Rows rank by **Deviation**" in Path("results/RANKING.md").read_text()


def test_a_new_method_and_its_pass_take_one_file(suite, run, generate, score, monkeypatch):
    folder = suite / "extra"
    folder.mkdir()
    (folder / "dummy.py").write_text(DUMMY)
    monkeypatch.setattr(baselines, "__path__", [*baselines.__path__, str(folder)])
    document = yaml.safe_load(Path("params.yaml").read_text())
    document["methods"]["dummy"] = {}
    document["tables"]["leaderboard"]["methods"].append("dummy")
    Path("params.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    try:
        assert generate("dummy", "w4a8") == (0, [])
        record = score("dummy", "w4a8")["w4a8"]
        assert record.metrics["temporal_error"].value >= 0 and record.settings["method"] == {"images": 2, "share": 0.9}
        names = ["weight ranges", "narrower ranges", "round to nearest", "activation ranges"]
        assert list(record.cost.seconds) == ["calibrate", *names, "sample"]
        assert record.cost.optimizer_steps == len(list(files.LEARNED.rglob("*.safetensors"))) > 10
        assert run("tables") == (0, [])
        assert "Dummy" in Path("README.md").read_text()
        page = Path("results/README.md").read_text()
        assert "Dummy" in page.split("## Leaderboard")[1].split("\n## ")[0]
        assert "round to nearest in narrower ranges, with per-step ranges" in Path("results/METHODS.md").read_text()
        cells = pd.read_csv("results/cells.csv").set_index(["method", "precision"])
        (row,) = cells.loc[[("dummy", "w4a8")]].to_dict("records")
        assert row["table"] == "leaderboard" and row["seconds_narrower_ranges"] > 0
    finally:
        sys.modules.pop("baselines.dummy", None)


def test_tables_without_any_record_say_what_to_run(suite, run):
    files.record_file(files.Cell("toy", "full_precision", "w32a32")).unlink()
    code, lines = run("tables")
    assert code == 1 and lines == ["error: there are no records in results/records: run `dvc repro`"]


def test_a_cell_that_cannot_be_scored_stops_no_other_one(suite, run, generate, score):
    generate("nearest")
    Path("work/cells/toy/nearest/w4a8/images/00000.safetensors").unlink()
    code, lines = run("score", "--task", "toy", "--method", "nearest", "--table", "leaderboard", "--shards", "1")
    assert code == 1 and len(lines) == 1 and lines[0].startswith("error: toy/nearest/w4a8: ")
    assert [path.stem for path in Path("results/records/toy/nearest").glob("*.json")] == ["w4a32"]


@pytest.mark.parametrize("stage", ["calibrate", "reference", "generate", "score", "tables"])
def test_help_describes_every_stage(stage, capsys):
    from benchmarks.__main__ import main

    with pytest.raises(SystemExit) as ended:
        main([stage, "--help"])
    assert ended.value.code == 0 and len(capsys.readouterr().out) > 150


def test_a_record_holds_settings_hashes_and_environment(suite, generate, score):
    generate("nearest", "w4a8")
    record = json.loads(score("nearest", "w4a8")["w4a8"].to_json())
    assert record["settings"]["task"]["steps"] == 3 and record["settings"]["method"]["images"] == 64
    assert set(record["inputs"]) == {"checkpoint", "calibration", "trajectory", "images"}
    assert record["environment"]["versions"]["torch"] == torch.__version__.split("+")[0]
