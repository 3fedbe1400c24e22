"""From cells to tables on the tiny suite; and what adding a method takes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

import baselines
from benchmarks.record import Record

DUMMY = '''
"""A method in one file: round to nearest with per-step ranges."""

from dataclasses import dataclass

from baselines import Method, applies_always
from tfmq.quantization import QuantizationConfig, quantize_


@dataclass(frozen=True)
class Config:
    images: int = 2


def quantize(unet, pool, precision, config, generator):
    rows = pool.spaced(pool.steps, config.images)
    setting = QuantizationConfig(activation_scales="per_step")
    return quantize_(unet, precision, setting, rows, rows, pool.timesteps, generator)


METHOD = Method("Dummy", "a test", Config, quantize, applies_always)
'''


def score(run, method: str, precision: str) -> Record:
    assert run("score", "--task", "toy", "--method", method, "--precision", precision) == (0, [])
    return Record.from_json(Path(f"results/records/toy-{method}-{precision}.json").read_text())


def test_records_and_tables_come_from_the_cells(suite, run, generate):
    full = score(run, "full_precision", "w32a32")
    assert "kid_fp" in full.metrics and "feature_distance" not in full.metrics
    for method in ("nearest", "tfmq"):
        for precision in ("w4a8", "w4a32"):
            assert generate(method, precision) == (0, [])
            record = score(run, method, precision)
            assert record.status == "measured" and record.metrics["psnr"].n == 6
            assert record.cost.unet_evaluations >= 12 and record.cost.seconds["calibrate"] > 0
            assert record.coverage["layers"]["conv2d w8a8" if precision == "w4a8" else "conv2d w8a32"] == 2
    assert run("tables") == (0, [])
    table = pd.read_csv("results/leaderboard.csv")
    assert len(table) == 5 and table["kid_fp"].notna().all()
    page = Path("results/README.md").read_text()
    assert "TFMQ-DM" in page and "Round-to-nearest" in page
    assert "TFMQ-DM" in Path("README.md").read_text()
    figures = sorted(path.name for path in Path("results/figures").iterdir())
    assert figures == [f"toy-{p}-{kind}.png" for p in ("w4a32", "w4a8") for kind in ("samples", "temporal")]
    before = {path: path.read_bytes() for path in Path("results").rglob("*.*")}
    assert run("tables") == (0, [])
    assert before == {path: path.read_bytes() for path in Path("results").rglob("*.*")}


def test_a_cell_without_a_record_stays_visible(suite, run):
    score(run, "full_precision", "w32a32")
    assert run("tables") == (0, [])
    assert Path("results/README.md").read_text().count("no record; run `dvc repro`") >= 4


def test_a_record_without_its_images_is_not_shown_as_measured(suite, run, generate):
    score(run, "full_precision", "w32a32")
    generate("nearest")
    score(run, "nearest", "w4a8")
    Path("work/cells/toy-nearest-w4a8/images.safetensors").unlink()
    assert run("tables") == (0, [])
    page = Path("results/README.md").read_text()
    assert "failed: its images are missing or newer than its record" in page


def test_a_new_method_takes_one_file(suite, run, generate, monkeypatch):
    folder = suite / "extra"
    folder.mkdir()
    (folder / "dummy.py").write_text(DUMMY)
    monkeypatch.setattr(baselines, "__path__", [*baselines.__path__, str(folder)])
    document = yaml.safe_load(Path("params.yaml").read_text())
    document["methods"]["dummy"] = {}
    Path("params.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    try:
        assert generate("dummy") == (0, [])
        assert score(run, "dummy", "w4a8").metrics["temporal_error"].value >= 0
        assert run("tables") == (0, [])
        assert "Dummy" in Path("README.md").read_text()
    finally:
        sys.modules.pop("baselines.dummy", None)


def test_tables_without_any_record_say_what_to_run(suite, run):
    code, lines = run("tables")
    assert code == 1 and lines == ["error: there are no records in results/records: run `dvc repro`"]


@pytest.mark.parametrize("stage", ["calibrate", "reference", "generate", "score", "tables"])
def test_help_describes_every_stage(stage, capsys):
    from benchmarks.__main__ import main

    with pytest.raises(SystemExit) as ended:
        main([stage, "--help"])
    assert ended.value.code == 0 and len(capsys.readouterr().out) > 150


def test_a_record_holds_settings_hashes_and_environment(suite, run, generate):
    generate("nearest")
    record = json.loads(score(run, "nearest", "w4a8").to_json())
    assert record["settings"]["task"]["steps"] == 3 and record["settings"]["method"]["images"] == 64
    assert set(record["inputs"]) == {"checkpoint", "calibration", "trajectory", "images"}
    assert record["environment"]["versions"]["torch"] == torch.__version__.split("+")[0]
