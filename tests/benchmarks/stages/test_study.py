"""Methods are measured with varied settings, and a run that was stopped goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from benchmarks.stages import study
from benchmarks.suite import params

STUDY = {
    "tasks": ["toy"],
    "precisions": ["w4a8"],
    "seeds": 2,
    "images": 3,
    "curves": {
        "To nearest": {"method": "nearest"},
        "AdaRound": {"method": "prev", "points": [{"iterations": 2}, {"iterations": 4}], "seeds": False},
        "More images": {"method": "nearest", "pool": 5, "seeds": False},
    },
}
LARGE = ("More images", 0, None)


@pytest.fixture
def studied(suite):
    """The tiny suite, which says what is studied."""
    settings = yaml.safe_load(Path("params.yaml").read_text())
    settings["methods"] = settings["methods"] | {"nearest": {}, "prev": {"images": 2, "batch": 2}}
    Path("params.yaml").write_text(yaml.safe_dump(settings | {"study": STUDY}, sort_keys=False))
    return suite


def test_every_point_is_measured_once_and_kept(studied, run, monkeypatch):
    assert run("study", "--task", "toy") == (0, [])
    found = json.loads(Path("results/study/toy.json").read_text())
    by = {(row["curve"], row["seed"], row["settings"].get("iterations")): row for row in found["points"]}
    assert set(by) == {("To nearest", 0, None), ("To nearest", 1, None), ("AdaRound", 0, 2), ("AdaRound", 0, 4), LARGE}
    assert by[LARGE]["noise_error"] != by["To nearest", 0, None]["noise_error"], "calibrated on other images"
    assert by["AdaRound", 0, 4]["optimizer_steps"] == 2 * by["AdaRound", 0, 2]["optimizer_steps"]
    for row in found["points"]:
        assert 0 < row["noise_error"]["value"] < 1 and row["median_deviation"] > 0 and row["cpu_seconds"] > 0
    page = Path("results/STUDY.md").read_text()
    assert "## toy, w4a8" in page and "iterations 4" in page and "pool 5" in page
    assert Path("results/study/toy-w4a8.png").read_bytes().startswith(b"\x89PNG")

    measured = []
    monkeypatch.setattr(study.Bench, "measure", lambda self, point, recipe: measured.append(point) or by_any(by))
    document = yaml.safe_load(Path("params.yaml").read_text())
    document["study"]["curves"]["AdaRound"]["points"].append({"iterations": 3})
    Path("params.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    assert run("study", "--task", "toy") == (0, [])
    assert [point.settings for point in measured] == [{"iterations": 3}], "only what is new"

    document["study"]["curves"]["Renamed"] = document["study"]["curves"].pop("AdaRound")
    Path("params.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    assert run("study", "--task", "toy") == (0, [])
    kept = json.loads(Path("results/study/toy.json").read_text())["points"]
    assert {row["curve"] for row in kept} == {"To nearest", "Renamed", "More images"} and len(measured) == 1


def by_any(by):
    names = ("cpu_seconds", "optimizer_steps", "evaluations", "noise_error", "deviation", "median_deviation")
    return {name: next(iter(by.values()))[name] for name in names}


def test_mistakes_are_one_line_each(studied, run):
    code, (line,) = run("study", "--task", "toi")
    assert code == 1 and "did you mean 'toy'" in line
    document = yaml.safe_load(Path("params.yaml").read_text())
    for wrong, text in (
        ({"protocol": "published"}, "study.curves.A is not applicable at w4a8: "),
        ({"method": "tdq", "precisions": ["w4a32"]}, "study.curves.A is not applicable at w4a32: "),
    ):
        curves = {"curves": {"A": {"method": "nearest"} | wrong}}
        Path("params.yaml").write_text(yaml.safe_dump(document | {"study": STUDY | curves}, sort_keys=False))
        code, (line,) = run("study", "--task", "toy")
        assert code == 1 and text in line
    for wrong, text in (
        ({"seeds": 0}, "study.seeds is 0, but must be at least 1"),
        ({"tasks": ["toi"]}, "did you mean 'toy'"),
        ({"curves": {"A": {"method": "prew"}}}, "did you mean 'prev'"),
        ({"curves": {"A": {"method": "prev", "pool": 0}}}, "pool of a curve is 0, but must be at least 1"),
        ({"curves": {"A": {"method": "prev", "points": [{"iteration": 1}]}}}, "did you mean 'iterations'"),
    ):
        with pytest.raises(ValueError, match=text):
            params.check_methods(params.parse(document | {"study": STUDY | wrong}))
