"""The generated pages on methods and coverage."""

import pandas as pd
import pytest
import yaml

from benchmarks.report import pages
from benchmarks.suite import params

REPORTED = pd.DataFrame(
    [
        ("ffhq", "tfmq", "w8a8", "fid", "9.46", "", "a poster"),
        ("ffhq", "tfmq", "w8a8", "sfid", "8.7", "", "a poster"),
        ("ffhq", "tfmq", "w4a8", "fid", "9.97", "*", "a poster"),
        ("ffhq", "full_precision", "w32a32", "fid", "9.36", "", "a poster"),
    ],
    columns=["task", "method", "precision", "metric", "value", "marker", "source"],
)


@pytest.fixture
def suite(task_settings):
    del task_settings["name"]
    table = {"protocol": "shared", "tasks": ["emoji-ldm4"], "precisions": ["w4a8"], "methods": ["nearest", "tfmq"]}
    return params.parse(
        {
            "name": "small",
            "tasks": {"emoji-ldm4": task_settings},
            "tables": {
                "leaderboard": table,
                "ablation": table | {"methods": ["prev"], "beside": ["tfmq"]},
                "published": table | {"protocol": "published", "methods": ["tfmq"], "beside": ["tfmq"]},
            },
            "methods": {"nearest": {"images": 8}, "tfmq": {}, "prev": {}, "tdq_qat": {"iterations": 40}},
            "study": {
                "tasks": ["emoji-ldm4"],
                "precisions": ["w4a8"],
                "seeds": 1,
                "images": 8,
                "curves": {"Nearest": {"method": "nearest"}, "Training": {"method": "tdq_qat"}},
            },
        }
    )


def test_every_row_has_its_text_its_places_and_its_settings(suite):
    text = pages.methods(suite, REPORTED)
    assert [line for line in text.splitlines() if line.startswith("## ")][:2] == ["## Round-to-nearest", "## TFMQ-DM"]
    assert "`baselines/tfmq.py` · arXiv 2311.16503 · in leaderboard, ablation, published" in text
    assert "Huang et al., CVPR 2024" in text
    assert "Settings here: `images` 8 (default 64)." in text
    assert text.count("Settings here: the defaults.") == 2
    shown = text.split("## TFMQ-DM")[1]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.splitlines() if line.startswith("|")]
    assert cells[0] == ["task", "precision", "fid", "sfid", "source"]
    assert cells[2:] == [["ffhq", "w4a8", "9.97\\*", "–", "a poster"], ["ffhq", "w8a8", "9.46", "8.7", "a poster"]]
    assert text.count("Reported:") == 1
    studied = text.split("## TDQ (training)")[1]
    assert "in no table: [STUDY.md](STUDY.md)" in studied and "`iterations` 40 (default 200000)" in studied


def test_rows_of_equal_coverage_share_a_line(make_record):
    covered = {"layers": {"conv2d w4a8": 9, "linear w4a8": 3}, "not_quantized": {}}
    reasons = {"the protocol leaves it out": [f"layer.{index} (conv2d)" for index in range(5)]}
    text = pages.coverage(
        [
            make_record(method="full_precision", precision="w32a32"),
            make_record(coverage=covered),
            make_record(method="tfmq", coverage=covered),
            make_record(method="tfmq", coverage=covered, seed=1),
            make_record(method="tfmq", protocol="published", coverage=covered | {"not_quantized": reasons}),
            make_record(method="odd", status="failed", reason="x", metrics={}, cost=None),
        ]
    )
    lines = [line for line in text.splitlines() if line.startswith("| w")]
    assert lines == [
        "| w4a8 | Round-to-nearest; TFMQ-DM | 9 conv2d w4a8, 3 linear w4a8 | – |",
        "| w4a8 | TFMQ-DM (published) | 9 conv2d w4a8, 3 linear w4a8 | the protocol leaves it out: `layer.0 (conv2d)`,"
        " `layer.1 (conv2d)`, `layer.2 (conv2d)` and 2 more |",
    ]


def test_every_row_of_this_repository_has_a_page(root):
    suite = params.parse(yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8")))
    text = pages.methods(suite, pd.read_csv(root / "baselines/reported.csv", dtype=str, keep_default_na=False))
    assert all(f"`baselines/{name}.py`" in text for table in suite.tables.values() for name in table.methods)
