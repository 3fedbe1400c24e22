"""The study page: tables and figures of the points that were measured, and what the same error takes."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.report import study


def _point(method: str, seconds: float, error: float, steps: int, **changes: object) -> dict[str, object]:
    found = {"curve": method, "method": method, "settings": {"rows": steps}, "protocol": "shared", "precision": "w4a8"}
    measured = {"cpu_seconds": seconds, "optimizer_steps": steps, "evaluations": 8, "median_deviation": 0.1, "seed": 0}
    value = {"value": error, "low": error / 2, "high": error * 2, "n": 4}
    key = f"{method} {steps} {changes}"
    return {"key": key} | found | measured | {"noise_error": value, "deviation": value} | changes


def _page(folder: Path, *points: dict[str, object]) -> str:
    written = folder / "study"
    written.mkdir()
    document = {"task": "toy", "images": 4, "environment": {"cpu": "a processor", "commit": 40 * "a"}, "points": points}
    (written / "toy.json").write_text(json.dumps(document))
    return study.write(written, folder / "STUDY.md")


def _rows(text: str) -> list[dict[str, str]]:
    lines = text.split(study.CHEAPEST)[1].split("\n## ")[0].strip().splitlines()
    head, _, *rows = [[field.strip() for field in line.split("|")[1:-1]] for line in lines]
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_the_quickest_recipe_that_reaches_an_error_stands_beside_it(tmp_path):
    text = _page(
        tmp_path,
        _point("tfmq", 50.0, 0.04, 400),
        _point("tfmq", 200.0, 0.02, 1600),
        _point("recommended", 8.0, 0.039, 1),
        _point("recommended", 4.0, 0.05, 2),
        _point("recommended", 10.0, 0.03, 3),
        _point("svdquant", 1.0, 0.01, 0),
        _point("recommended", 1.0, 0.01, 4, protocol="deployable"),
    )
    reached, missed = _rows(text)
    assert reached["TFMQ-DM"] == "tfmq, rows 400" and reached["Recipe"] == "recommended, rows 1"
    assert (reached["Its noise error"], reached["Share"]) == ("0.0390", "16%")
    assert missed["Recipe"] == "recommended, rows 3"
    assert (missed["Its noise error"], missed["Share"]) == ("0.0300, larger", "5%")


def test_a_point_of_two_curves_is_compared_once(tmp_path):
    point = _point("tfmq", 50.0, 0.04, 400)
    (row,) = _rows(_page(tmp_path, point, point | {"curve": "again"}, _point("recommended", 8.0, 0.039, 1)))
    assert row["TFMQ-DM"] == "tfmq, rows 400"


def test_precisions_are_compared_each_by_itself(tmp_path):
    text = _page(tmp_path, _point("tfmq", 50.0, 0.04, 400), _point("recommended", 8.0, 0.01, 1, precision="w8a8"))
    assert study.CHEAPEST not in text and "## toy, w8a8" in text and "## toy, w4a8" in text
