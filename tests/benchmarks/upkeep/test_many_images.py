"""Rows with many images: all are made anew, only once, and nothing else changes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml

from benchmarks.upkeep import many_images
from benchmarks.upkeep.scratch import open_scratch


def test_rows_of_many_images_are_made_beside_the_suite(suite, monkeypatch, capsys):
    path = Path("params.yaml")
    document = yaml.safe_load(path.read_text()) | {"many_images": {"tasks": ["toy"], "precision": "w4a8", "images": 6}}
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    arguments = ["--task", "toy", "--device", "cpu", "--shards", "1"]
    before = sorted(map(str, Path("results").rglob("*")))
    assert many_images.main(arguments) == 0
    found = json.loads(Path("results/many_images/toy.json").read_text())
    assert (found["task"], found["precision"], found["images"]) == ("toy", "w4a8", 6)
    assert set(found["rows"]) == {"nearest", "tfmq"} and found["rows"]["tfmq"]["metrics"]["feature_distance"] >= 0
    assert found["rows"]["tfmq"]["settings"]["iterations"] == 2 and found["task_version"] == 1
    after = {str(each) for each in Path("results").rglob("*")} - set(before)
    assert after == {"results/many_images", "results/many_images/toy.json"}
    monkeypatch.setattr(many_images.generate, "run", lambda *_: 1 / 0)
    assert many_images.main(arguments) == 0, "what is finished is not made again"
    assert many_images.main(["--task", "absent"]) == 1
    assert "none of the tasks under `many_images` of params.yaml, which are toy" in capsys.readouterr().err
    assert [path.name.split("-")[1] for path in Path(".resume").glob("many_images-*")] == ["toy"]


def test_a_folder_of_another_task_is_left_alone(tmp_path):
    device = torch.device("cpu")
    longer, lock = open_scratch(tmp_path, device, "many_images-toy-two")
    lock.close()
    (tmp_path / "params.yaml").write_text("name: changed")
    folder, lock = open_scratch(tmp_path, device, "many_images-toy")
    assert longer.is_dir() and folder.is_dir()
    lock.close()
    (tmp_path / "params.yaml").write_text("name: again")
    _, lock = open_scratch(tmp_path, device, "many_images-toy")
    assert longer.is_dir() and not folder.exists()
    lock.close()
