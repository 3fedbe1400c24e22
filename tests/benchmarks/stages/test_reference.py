"""What a task's images are compared with is the same however the work is cut, and continues where it was stopped."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.datasets import _published, dataset
from benchmarks.features import Evaluator, Extractor, Features
from benchmarks.metrics import reference_statistics
from benchmarks.metrics._frechet import moments
from benchmarks.runtime import files
from benchmarks.small.data import Emoji, write_sheet, write_table
from benchmarks.stages import _data_features, reference
from benchmarks.suite.params import Suite
from benchmarks.suite.tasks import Task

CPU = torch.device("cpu")
COUNT = 23
HELD_OUT = (3, 8, 21)
TASK = Task(
    name="toy",
    version=1,
    family="ldm",
    checkpoint="data/toy",
    resolution=32,
    scheduler="ddim",
    steps=2,
    eta=0.0,
    guidance_scale=1.0,
    images=4,
    batch=2,
    calibration_images=2,
    reference_images=0,
    evaluator="inception",
    dataset="emoji",
    data="data/emoji",
)


class Colours(nn.Module):
    """Features that can be worked out by hand: mean colours, of some rows of the image."""

    def __init__(self, rows: int):
        super().__init__()
        self.rows = rows

    def forward(self, images):
        pooled = images[:, :, : self.rows].double().mean(dim=(2, 3)).float()
        return Features(pooled=pooled, spatial=pooled @ torch.ones(3, 2) + pooled[:, :2], logits=-pooled), (images,)


class Brightness:
    """A CLIP whose cosines are 0.25 where an image is black, and 0.75 where it is white."""

    identity = "toy-clip 01234567"

    def __init__(self, folder, device):
        pass

    def embed_images(self, images):
        cosine = 0.25 + images.double().mean(dim=(1, 2, 3)) / 510
        return torch.stack([cosine, (1 - cosine.square()).sqrt()], 1).float()

    def embed_prompts(self, prompts):
        return torch.tensor([[1.0, 0.0]]).repeat(len(prompts), 1)


def evaluator(name, digest="0123456789abcdef", batch=4):
    network = Colours(32 if name == "inception" else 8)
    kind = Extractor(name, 1, 32, batch, "FD", "weights", keeps_maps=False, load=lambda path: network)
    return Evaluator(kind, digest, CPU, network)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Images of a data set in the current folder, units of four images, and evaluators without weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_data_features, "_evaluator", lambda name, device: evaluator(name))
    monkeypatch.setattr(_data_features, "UNIT_BATCHES", 1)
    write_images(seed=0)
    yield tmp_path
    for cached in (_data_features.evaluator_of, _data_features.second_evaluator_of, _data_features.data_of):
        cached.cache_clear()


def write_images(seed):
    data = Path(TASK.data)
    data.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    write_sheet(torch.randint(0, 256, (COUNT, 3, 64, 64), dtype=torch.uint8, generator=generator), data / "sheet.webp")
    splits = ["held-out" if index in HELD_OUT else "train" for index in range(COUNT)]
    rows = [Emoji(i, f"emoji {i}", "Objects", "google", split) for i, split in enumerate(splits)]
    write_table(rows, data / "emoji.csv")


def run(shards=1, **changes):
    task = dataclasses.replace(TASK, **changes)
    reference.run(Suite("tiny", {"toy": task}, {}, {}), "toy", "cpu", shards)
    second = None if task.second_evaluator is None else evaluator(task.second_evaluator)
    return reference.read(task, evaluator("inception"), second)


def expected(name="inception"):
    images = torch.cat(list(dataset("emoji").images(Path(TASK.data), 32).batches(COUNT)))
    return evaluator(name).network(images)[0]


def made_with():
    return json.loads((files.reference("toy") / reference.EVALUATOR).read_text())


def contents():
    return {path.name: path.read_bytes() for path in files.reference("toy").iterdir()}


def close(found, wanted):
    assert found.count == wanted.count
    torch.testing.assert_close(found.mean, wanted.mean, rtol=1e-10, atol=0)
    torch.testing.assert_close(found.covariance, wanted.covariance, rtol=1e-10, atol=1e-10)


def test_a_clip_scores_real_images_that_were_held_out(monkeypatch):
    monkeypatch.setattr(reference, "load_clip", Brightness)
    run()
    assert "clip" not in made_with()
    run(clip=("data/toy-clip",), prompts="prompts/toy")
    images = torch.cat(list(dataset("emoji").images(Path(TASK.data), 32).batches(COUNT)))[list(HELD_OUT)]
    wanted = 100 * (0.25 + images.double().mean() / 510).item()
    (found,) = made_with()["clip"]
    assert found == {"clip": "toy-clip 01234567", "score": pytest.approx(wanted, abs=1e-4), "images": 3}


def test_data_gives_moments_of_both_evaluators_and_features():
    found = run(second_evaluator="inception_clean")
    wanted = reference_statistics(expected())
    for part in ("pooled", "spatial"):
        assert torch.equal(getattr(found.data_statistics, part).mean, getattr(wanted, part).mean)
        assert torch.equal(getattr(found.data_statistics, part).covariance, getattr(wanted, part).covariance)
    assert torch.equal(found.data_pooled, expected().pooled)
    assert torch.equal(found.second_data.mean, moments(expected("inception_clean").pooled).mean)
    assert not torch.equal(found.second_data.mean, found.data_statistics.pooled.mean)
    assert found.samples is found.samples_statistics is None
    assert made_with()["identity"] == evaluator("inception").identity
    assert made_with()["second"] == evaluator("inception_clean").identity
    assert made_with()["data"].startswith(f"{dataset('emoji').identity}, 32px, {COUNT} images, pixels ")
    assert not list(files.RESUME.rglob("*.safetensors"))


@pytest.mark.parametrize("chunk", [5, 7, 11, 22, 23])
def test_chunks_give_the_moments_of_all_images_and_the_first_features(chunk, monkeypatch):
    monkeypatch.setattr(_data_features, "CHUNK", chunk)
    found = run(second_evaluator="inception_clean")
    close(found.data_statistics.pooled, moments(expected().pooled))
    close(found.data_statistics.spatial, moments(expected().spatial))
    close(found.second_data, moments(expected("inception_clean").pooled))
    assert torch.equal(found.data_pooled, expected().pooled[:chunk])


def test_processes_share_the_images_and_give_the_same_bytes(monkeypatch):
    monkeypatch.setattr(_data_features, "CHUNK", 13)
    found = []
    for shards in (1, 2):
        run(shards, second_evaluator="inception_clean")
        found.append(contents())
    assert found[0] == found[1]


def test_the_identity_is_that_of_the_pixels_however_they_are_cut(monkeypatch):
    run()
    before = made_with()["data"]
    monkeypatch.setattr(_data_features, "CHUNK", 6)
    run()
    assert made_with()["data"] == before
    write_images(seed=1)
    run()
    assert made_with()["data"] != before and made_with()["data"][:-8] == before[:-8]


def test_the_first_images_of_a_data_set_are_enough_but_not_fewer():
    assert torch.equal(run(data_images=9).data_pooled, expected().pooled[:9])
    with pytest.raises(ValueError, match="data/emoji has 23 images, but data_images of task toy asks for 24"):
        run(data_images=24)


@pytest.fixture
def published(monkeypatch):
    monkeypatch.setattr(_published, "POOLED", 3)
    monkeypatch.setattr(_published, "SPATIAL", 2)
    mean, covariance = np.arange(3.0), np.diag([1.0, 2.0, 3.0])
    np.savez("adm.npz", mu=mean, sigma=covariance, mu_s=mean[:2], sigma_s=covariance[:2, :2])
    np.savez("cifar10_clean_train_32.npz", mu=mean, sigma=covariance)


def test_published_statistics_take_the_place_of_data(published):
    found = run(dataset=None, data=None, statistics="adm.npz", second_evaluator="inception_clean")
    assert found.data_statistics.spatial.covariance.tolist() == [[1, 0], [0, 2]]
    assert found.data_statistics.pooled.count == 0
    assert found.data_pooled is found.second_data is None
    assert made_with()["data"] == _published.identity(Path("adm.npz")) and "features" not in made_with()


def test_features_stand_beside_published_statistics(published, monkeypatch):
    monkeypatch.setattr(_data_features, "CHUNK", 10)
    found = run(statistics="adm.npz")
    assert found.data_statistics.pooled.mean.tolist() == [0, 1, 2]
    assert torch.equal(found.data_pooled, expected().pooled[:10]) and found.second_data is None
    assert made_with()["data"] == _published.identity(Path("adm.npz"))
    assert ", 10 images," in made_with()["features"]
    found = run(statistics="adm.npz", second_evaluator="inception_clean")
    close(found.second_data, moments(expected("inception_clean").pooled))
    assert found.data_statistics.pooled.mean.tolist() == [0, 1, 2]


def test_published_statistics_of_another_resize_are_refused_before_any_work(published):
    with pytest.raises(ValueError, match="made with inception_clean, so inception cannot be compared with it"):
        run(dataset=None, data=None, statistics="cifar10_clean_train_32.npz")
    assert not files.reference("toy").exists()


def test_what_was_made_with_another_evaluator_is_not_read():
    run(second_evaluator="inception_clean")
    task = dataclasses.replace(TASK, second_evaluator="inception_clean")
    other, second = evaluator("inception", "ffffffffffff"), evaluator("inception_clean", "ffffffffffff")
    with pytest.raises(ValueError, match="was made with inception@1-32px-01234567, not with inception@1-32px-ffffffff"):
        reference.read(task, other)
    with pytest.raises(ValueError, match="was made with inception_clean@1-32px-01234567, not with inception_clean"):
        reference.read(task, evaluator("inception"), second)


def stop_at(unit, monkeypatch):
    """Let the work stop at the n-th unit from now; returns the units that are begun."""
    begun = []
    extract = _data_features._extract

    def stopping(task, device, work):
        begun.append(work[0].start)
        if len(begun) == unit:
            raise KeyboardInterrupt
        extract(task, device, work)

    monkeypatch.setattr(_data_features, "_extract", stopping)
    return begun


@pytest.mark.parametrize("unit", [1, 3, 5])
def test_a_stopped_run_continues(unit, monkeypatch):
    monkeypatch.setattr(_data_features, "CHUNK", 12)
    whole = run().data_statistics.to_tensors(), contents()
    with monkeypatch.context() as patch:
        stop_at(unit, patch)
        with pytest.raises(KeyboardInterrupt):
            run()
    assert contents() == whole[1]
    begun = stop_at(0, monkeypatch)
    run()
    assert contents() == whole[1]
    # Chunks of 11 and 12 images in units of four
    assert begun == [0, 4, 8, 11, 15, 19][unit - 1 :]
    assert not list(files.RESUME.rglob("*.safetensors"))


def test_a_stopped_run_on_other_images_begins_anew(monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(3, patch)
        with pytest.raises(KeyboardInterrupt):
            run()
    _data_features.data_of.cache_clear()
    write_images(seed=1)
    begun = stop_at(0, monkeypatch)
    assert torch.equal(run().data_pooled, expected().pooled)
    assert begun == [0, 4, 8, 12, 16, 20]


def test_images_that_cannot_be_read_leave_the_reference_as_it_was():
    run()
    before = contents()
    Path("data/emoji/sheet.webp").write_bytes(b"RIFF")
    with pytest.raises((ValueError, OSError)):
        run()
    assert contents() == before
