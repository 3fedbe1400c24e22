"""What is seen of a cell in parts, by any number of processes, is what is seen of all its images at once."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from benchmarks.features import Evaluator, Extractor, Features, compare, extract, extract_with_maps
from benchmarks.metrics import Evidence, References, reference_statistics
from benchmarks.runtime import excerpt, files
from benchmarks.runtime.images import batch_name
from benchmarks.stages import _evidence, reference, score
from benchmarks.suite.outcome import Made, Outcome, Quantized
from benchmarks.suite.params import Suite
from benchmarks.suite.record import Cell, Record
from benchmarks.suite.tasks import Task

CPU = torch.device("cpu")
COUNT = 21
FULL = Cell("toy", "full_precision", "w32a32")
ROW = Cell("toy", "nearest", "w4a8")
TASK = Task(
    name="toy",
    version=1,
    family="ldm",
    checkpoint="data/toy",
    resolution=8,
    scheduler="ddim",
    steps=2,
    eta=0.0,
    guidance_scale=1.0,
    images=COUNT,
    batch=5,
    calibration_images=2,
    reference_images=0,
    evaluator="colour",
    statistics="data.npz",
    second_evaluator="brightness",
    prompts="prompts",
    clip=("data/first", "data/second"),
)
SIZES = Quantized(size_mib=1.0, full_precision_size_mib=4.0, peak_memory_mib=1.0)


class Colour(nn.Module):
    def forward(self, images):
        maps = images.float() + 1
        pooled = maps.mean(dim=(2, 3))
        return Features(pooled=pooled, spatial=maps.flatten(1)[:, :4], logits=-pooled), (maps, maps[:, :2])


class Clip:
    """A CLIP that sees an image's mean colour, and in a prompt its letters."""

    def __init__(self, folder):
        self.identity = f"{folder.name} 57934424"
        self.weight = 1.0 if folder.name == "first" else 0.5

    def embed_images(self, images):
        return nn.functional.normalize(images.float().mean(dim=(2, 3)) ** self.weight, dim=1)

    def embed_prompts(self, prompts):
        return torch.tensor([[len(prompt), 1.0, prompt.count("e")] for prompt in prompts])


def pixels(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (COUNT, 3, 8, 8), dtype=torch.uint8, generator=generator)


def evaluator(keeps_maps, name="colour"):
    extractor = Extractor(name, 1, 8, 2, "FD", weights=name, keeps_maps=keeps_maps, load=lambda path: Colour())
    return Evaluator(extractor, "0123456789", CPU, Colour())


def save_cell(cell, images):
    folder = files.cell_folder(cell)
    for index, part in enumerate(images.split(TASK.batch)):
        (folder / files.IMAGES).mkdir(parents=True, exist_ok=True)
        save_file({"images": part.contiguous()}, folder / files.IMAGES / batch_name(index))
    hashed = files.sha256_folder(folder / files.IMAGES)
    outcome = Outcome("measured", made=Made("cpu", {}, sample_seconds=1.0, images=hashed, quantized=SIZES))
    files.write_json(folder / files.OUTCOME, outcome.to_json())
    errors = {"trajectory": torch.rand(4, 2), "temporal": torch.rand(2, 3), "timesteps": torch.tensor([9, 1])}
    save_file(errors, folder / files.ERRORS)


@pytest.fixture(params=[True, False], ids=["maps-kept", "maps-made-again"])
def suite(request, tmp_path, monkeypatch):
    """Two cells whose images lie on disk; parts of eight images, read four at a time, seen two at a time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_evidence, "PART", 8)
    monkeypatch.setattr(_evidence, "CHUNK", 4)
    monkeypatch.setattr(_evidence, "evaluator_of", lru_cache(lambda task, device: evaluator(request.param)))
    monkeypatch.setattr(
        _evidence, "second_evaluator_of", lru_cache(lambda task, device: evaluator(False, "brightness"))
    )
    monkeypatch.setattr(_evidence, "load_clip", lambda folder, device: Clip(folder))
    data = Features(*(torch.rand(30, width) for width in (3, 4, 3)))
    statistics = reference_statistics(data)
    found = References(statistics, data_pooled=data.pooled, second_data=statistics.pooled)
    monkeypatch.setattr(reference, "read", lambda task, first, second: found)
    Path("prompts").mkdir()
    Path("prompts/evaluation.txt").write_text("red\ngreen\nblue\nevergreen\n")
    save_cell(FULL, pixels(0))
    save_cell(ROW, pixels(1))
    files.write_json(files.calibration("toy") / files.COST, {"seconds": 1.0, "unet_evaluations": 4})
    files.write_json(files.reference("toy") / reference.EVALUATOR, {"identity": "colour", "data": "emoji @ 1"})
    return Suite("tiny", {"toy": TASK}, {}, {})


def seen(suite, monkeypatch, cell):
    """What scoring a cell sees, and its record."""
    kept = []
    with monkeypatch.context() as patch:
        patch.setattr(score, "Evidence", lambda **fields: kept.append(fields) or Evidence(**fields))
        score.run(suite, [cell], "cpu", 1)
    return kept[0], Record.from_json(files.record_file(cell).read_text())


def test_parts_are_seen_as_all_images_at_once(suite, monkeypatch):
    full, full_record = seen(suite, monkeypatch, FULL)
    row, record = seen(suite, monkeypatch, ROW)
    own, paired = pixels(1), pixels(0)
    features, distance = compare(evaluator(True), own, extract_with_maps(evaluator(True), paired)[1])
    expected = extract(evaluator(True), paired)
    for name, tensor in vars(features).items():
        assert torch.equal(getattr(row["features"], name), tensor)
        assert torch.equal(getattr(row["paired_features"], name), getattr(expected, name))
        assert torch.equal(getattr(full["features"], name), getattr(expected, name))
    assert torch.equal(row["perceptual_distance"], distance)
    assert torch.equal(row["squared_error"], (own.double() - paired.double()).square().mean(dim=(1, 2, 3)))
    assert torch.equal(row["second_features"], features.pooled)
    prompts = [("red", "green", "blue", "evergreen")[index % 4] for index in range(COUNT)]
    for folder, cosines in zip(TASK.clip, row["clip_cosines"], strict=True):
        scorer = Clip(Path(folder))
        assert torch.equal(cosines, (scorer.embed_images(own) * scorer.embed_prompts(prompts)).sum(dim=1))
    assert not {"squared_error", "perceptual_distance", "paired_features"} & set(full)
    assert {"fd_data", "fd_clean", "kid_data", "clip_score", "clip_score_second"} <= set(full_record.metrics)
    assert {"psnr", "perceptual", "feature_distance"} <= set(record.metrics) - set(full_record.metrics)
    assert record.settings["clip"] == ["first 57934424", "second 57934424"]
    assert record.settings["reference"] == {"data": "emoji @ 1"}
    assert record.settings["second_evaluator"].startswith("brightness@1")


def test_processes_share_the_images_of_one_cell(suite):
    records = []
    for shards in (1, 2):
        for cell in (FULL, ROW):
            score.run(suite, [cell], "cpu", shards)
        records.append([files.record_file(cell).read_text() for cell in (FULL, ROW)])
        records[-1] += [files.sha256_folder(files.paired("toy")), files.sha256(excerpt.path_of(ROW))]
    assert records[0] == records[1]
    assert not [path.name for path in files.WORK.iterdir() if path.name.startswith(".")]


def test_a_cell_that_lacks_images_stops_no_other_one(suite):
    score.run(suite, [FULL], "cpu", 1)
    other, third = replace(ROW, precision="w8a8"), replace(ROW, precision="w4a32")
    save_cell(other, pixels(2)[:20])
    save_cell(third, pixels(3))
    (files.cell_folder(third) / files.IMAGES / batch_name(2)).write_bytes(b"short")
    with pytest.raises(ExceptionGroup, match="2 of 3 cells failed") as group:
        score.run(suite, [other, third, ROW], "cpu", 1)
    first, second = sorted(map(str, group.value.exceptions))
    assert first == "toy/nearest/w8a8 has 20 images of 8 x 8 pixels, but the task has 21 of 8 x 8: run `dvc repro`"
    assert "00002.safetensors is damaged or truncated" in second
    assert sorted(error.__notes__ for error in group.value.exceptions) == [["toy/nearest/w4a32"], ["toy/nearest/w8a8"]]
    assert json.loads(files.record_file(ROW).read_text())["status"] == "measured"
    assert not files.record_file(other).exists() and not files.record_file(third).exists()


def test_without_the_full_precision_cell_a_row_says_what_to_run(suite):
    with pytest.raises(ExceptionGroup) as group:
        score.run(suite, [ROW], "cpu", 1)
    assert "run `dvc repro`, which makes it" in str(group.value.exceptions[0])


def test_what_cells_are_paired_with_says_who_has_seen_it(suite, monkeypatch):
    score.run(suite, [FULL], "cpu", 1)
    before = files.sha256_folder(files.paired("toy"))
    load = Clip.__init__
    monkeypatch.setattr(Clip, "__init__", lambda self, folder: load(self, folder.with_name(f"new-{folder.name}")))
    score.run(suite, [FULL], "cpu", 1)
    assert files.sha256_folder(files.paired("toy")) != before, "a changed CLIP changes what other scores depend on"
