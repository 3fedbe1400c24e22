"""Cells are drawn in rounds, as `generate` and `score` would draw them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file, save_file

from benchmarks import __main__ as command_line
from benchmarks.models.ldm import FAMILY
from benchmarks.report import rounds as report
from benchmarks.runtime import excerpt, manifest
from benchmarks.stages import tables
from benchmarks.stages._data_features import evaluator_of
from benchmarks.suite import params
from benchmarks.suite.record import Cell, Record


@pytest.fixture
def with_rounds(suite):
    """The tiny suite with rounds, and few rows."""
    document = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    document["rounds"] = {"images": {"toy": [4, 6]}}
    document["tables"] = {"leaderboard": document["tables"]["leaderboard"] | {"precisions": ["w4a8"]}}
    document["tables"]["published"] = {
        "protocol": "published",
        "tasks": ["toy"],
        "precisions": ["w4a8"],
        "methods": ["nearest"],
    }
    Path("params.yaml").write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")


def told(capsys, *arguments):
    assert command_line.main(["rounds", "--task", "toy", *arguments]) == 0
    return capsys.readouterr().out


def values(cell):
    return excerpt.read_from(Path("results/rounds", f"{cell.name}.npz")).values


def test_cells_are_drawn_until_claims_are_decided_or_rounds_end(with_rounds, generate, score, capsys):
    assert "- tfmq/w4a8: 4 images" in told(capsys) and not Path("results/rounds").exists()
    out = told(capsys, "--draw")
    assert "No cell goes on." in out and told(capsys) == out
    cell = Cell("toy", "tfmq", "w4a8")
    record = Record.load(Path("results/rounds", f"{cell.name}.json"))
    images = record.settings["task"]["images"]
    assert images in (4, 6) and {value.n for value in record.metrics.values()} == {images}
    assert record.cost.optimizer_steps > 0 and len(record.inputs) == 3
    refused = Record.load(Path("results/rounds/toy/nearest-published/w4a8.json"))
    assert refused.status == "not applicable" and refused.reason

    assert generate("tfmq", "w4a8") == (0, [])
    score("tfmq", "w4a8")
    scored = excerpt.read(cell).values
    for name, found in values(cell).items():
        both = min(images, len(scored[name]))
        assert len(found) == images
        np.testing.assert_allclose(found[:both], scored[name][:both], rtol=1e-5, err_msg=name)


def test_a_run_that_was_stopped_goes_on(with_rounds, monkeypatch, capsys):
    told(capsys, "--draw")
    before = {path: path.stat().st_mtime_ns for path in Path("work/rounds").rglob("*.safetensors")}
    first = values(Cell("toy", "tfmq", "w4a8"))
    for path in Path("results/rounds").rglob("tfmq/*"):
        path.unlink()
    next(path for path in before if "part" in path.name and "tfmq" in str(path)).unlink()
    told(capsys, "--draw")
    made = {path for path in before if path.stat().st_mtime_ns != before[path]}
    assert [path.name[:4] for path in made] == ["part"], "the batch that was missing, and nothing else"
    for name, found in values(Cell("toy", "tfmq", "w4a8")).items():
        np.testing.assert_array_equal(found, first[name])


def test_a_record_of_other_settings_is_none(with_rounds, capsys):
    told(capsys, "--draw")
    document = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    document["methods"]["tfmq"]["iterations"] = 3
    Path("params.yaml").write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    out = told(capsys)
    assert "- tfmq/w4a8: 4 images" in out and "- nearest/w4a8" not in out


def test_a_record_that_was_made_from_something_else_is_none(with_rounds, capsys):
    told(capsys, "--draw")
    drawn = told(capsys)
    record = Path("results/rounds/toy/tfmq/w4a8.json")
    before = Record.load(record)
    pool, weights = Path("work/calibration/toy/pool.safetensors"), Path("data/efficientnet-lite0/model.safetensors")

    def after(*changes):
        """What is told with other tensors in some files, which are then put back."""
        kept = {path: path.read_bytes() for path in changes}
        for path in changes:
            save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)
        manifest.write(weights.parent)
        evaluator_of.cache_clear()
        found = told(capsys)
        for path, content in kept.items():
            path.write_bytes(content)
        manifest.write(weights.parent)
        evaluator_of.cache_clear()
        return found

    assert "- tfmq/w4a8: 4 images" in after(pool) and "- nearest/w4a8: 4 images" in after(weights)
    assert "nearest-published" not in after(pool, weights), "what is not applicable stays so"
    assert told(capsys) == drawn, "nothing has changed in the end"
    pool.rename(pool.with_suffix(".away"))
    assert told(capsys) == drawn, "what is not there decides nothing"
    pool.with_suffix(".away").rename(pool)

    FAMILY.save_tiny(Path("data/toy"), 1)
    assert "- tfmq/w4a8: 4 images" in told(capsys)
    told(capsys, "--draw")
    found = Record.load(record)
    assert found.inputs["checkpoint"] != before.inputs["checkpoint"] and found.metrics != before.metrics
    assert "No cell goes on." in told(capsys)


def full_record(name):
    return Record.load(Path("results/full/toy", f"{name}.json"))


def test_all_images_of_named_cells_are_drawn_on_top_of_their_rounds(with_rounds, generate, score, capsys):
    document = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    document["rounds"] = {"images": {"toy": [4]}}
    Path("params.yaml").write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    told(capsys, "--draw")
    names = ("full_precision/w32a32", "tfmq/w4a8", "nearest-published/w4a8")
    out = told(capsys, "--full", *names)
    drawn = [path.name for path in Path("work/rounds").glob("toy/tfmq/*/features-*")]
    assert drawn == ["features-00002.safetensors"], "the batches of rounds have theirs"
    assert len(list(Path("work/rounds").glob("toy/full_precision/*/features-*"))) == 3
    assert len(list(Path("work/rounds").glob("toy-*/*.safetensors"))) == 2, "no trajectory but those of rounds"

    assert generate("tfmq", "w4a8") == (0, [])
    score("tfmq", "w4a8")
    for name in names[:2]:
        found, scored = full_record(name), Record.load(Path("results/records/toy", f"{name}.json"))
        assert {"fd_data", "is_score"} <= found.metrics.keys() <= scored.metrics.keys()
        for metric, value in found.metrics.items():
            assert value.n == scored.metrics[metric].n
            assert value.value == pytest.approx(scored.metrics[metric].value, rel=1e-4, abs=1e-6), metric
        assert found.settings["task"]["images"] == 6 and found.cost.seconds["sample"] > 0
        assert found.cost.size_mib == scored.cost.size_mib
        assert f"| {name} | 6 |" in out
    refused = full_record("nearest-published/w4a8")
    assert refused.status == "not applicable" and "| nearest-published/w4a8 | – | – | – |" in out

    before = {path: path.stat().st_mtime_ns for path in Path("work/rounds").rglob("*.safetensors")}
    assert told(capsys, "--full", *names) == out
    assert before == {path: path.stat().st_mtime_ns for path in Path("work/rounds").rglob("*.safetensors")}


def test_a_cell_that_the_task_does_not_have_is_named(with_rounds, run):
    code, (line,) = run("rounds", "--task", "toy", "--full", "tfqm/w4a8")
    assert code == 1 and "unknown cell of toy 'tfqm/w4a8': did you mean 'tfmq/w4a8'" in line


def test_all_images_take_what_they_are_compared_with(with_rounds, run):
    Path("work/reference/toy/evaluator.json").unlink()
    code, (line,) = run("rounds", "--task", "toy", "--full", "full_precision/w32a32")
    assert code == 1 and "work/reference/toy/evaluator.json is missing" in line
    assert not list(Path("work").glob("rounds/toy/*/*/features-*")), "before anything is drawn"


def test_what_rounds_decide_is_a_finding(with_rounds, monkeypatch, capsys):
    document = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    document["tables"] = {"leaderboard": document["tables"]["leaderboard"] | {"methods": ["tfmq", "tfmq_per_step"]}}
    document["methods"]["tfmq_per_step"] = document["methods"]["tfmq"]
    Path("params.yaml").write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    suite, decide = params.load(Path("params.yaml")), report.decide
    told(capsys, "--draw")

    def found():
        tables.run(suite)
        return Path("results/FINDINGS.md").read_text(encoding="utf-8")

    assert "in rounds" not in found(), "six images decide nothing"

    def sure(*arguments):
        decision = decide(*arguments)
        (judged,) = decision.claims
        return dataclasses.replace(decision, claims=(dataclasses.replace(judged, verdict="confirmed", p=0.01),))

    monkeypatch.setattr(report, "decide", sure)
    claim = "| Scales per step everywhere, as in the code, improve TFMQ-DM | asked here |"
    assert f"{claim} **confirmed** w4a8 in rounds (6 images, p 0.01) |" in found()


def test_a_task_without_rounds_is_named(suite, run):
    assert run("rounds", "--task", "toy") == (
        1,
        ["error: toy is none of the tasks under `rounds.images` of params.yaml, which are none"],
    )
