"""The stage that makes evaluators' folders of fetched files, whole or not at all."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import open_clip
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from benchmarks.runtime import manifest
from benchmarks.sources import disk
from benchmarks.stages import weights

FILES = {"inception": Path("downloads/inception.pth"), "open-clip-vit-b-32": Path("downloads/clip.safetensors")}
WEIGHTS = {"a": torch.arange(300.0), "b": torch.ones(2)}


class Canary:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("canary",)


@pytest.fixture(autouse=True)
def suite(tmp_path, monkeypatch):
    """A suite's folder with an Inception and a CLIP, whose hashes are published."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: {"name": name})
    Path("downloads").mkdir()
    torch.save(WEIGHTS, FILES["inception"])
    save_file(WEIGHTS, FILES["open-clip-vit-b-32"])
    publish(hashed=True)


def publish(hashed: bool) -> None:
    sources = {
        name: {"file": path.name, "urls": ["https://example.org/file"], "page": "here", "licence": "none"}
        | ({"sha256": hashlib.sha256(path.read_bytes()).hexdigest()} if hashed else {})
        for name, path in FILES.items()
    }
    Path("sources.yaml").write_text(yaml.safe_dump(sources), encoding="utf-8")


def test_evaluators_become_folders():
    assert weights.run("inception") == Path("data/inception")
    found = load_file("data/inception/model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in WEIGHTS.items())
    folder = weights.run("open-clip-vit-b-32")
    assert folder == Path("data/clip/openai")
    assert (folder / "open_clip_model.safetensors").read_bytes() == FILES["open-clip-vit-b-32"].read_bytes()
    for name in ("inception", "clip/openai"):
        manifest.verify(Path("data") / name)


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_made_of_a_damaged_or_missing_file(name):
    path = FILES[name]
    good = path.read_bytes()
    for damaged in (good[:-100], good[:900] + bytes([good[900] ^ 1]) + good[901:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{path} is not {name}: .*: delete it and run .* fetch --source {name}`"):
            weights.run(name)
    path.unlink()
    with pytest.raises(ValueError, match=f"{path} is missing: run .* fetch --source {name}`"):
        weights.run(name)
    assert not Path("data").exists()
    path.write_bytes(good)
    weights.run(name)


@pytest.mark.parametrize("content", [Canary(), [torch.ones(2)], {"a": 1}, torch.nn.Linear(2, 2)])
def test_other_content_is_refused_in_one_line_and_never_run(content):
    torch.save(content, FILES["inception"])
    publish(hashed=False)
    with pytest.raises(ValueError, match="inception.pth is not inception: it is not a dictionary of tensors") as error:
        weights.run("inception")
    assert "\n" not in str(error.value)
    assert not Path("canary").exists() and not list(Path("data").iterdir())


def test_a_disk_that_is_too_small_is_noticed_before(monkeypatch):
    usage = disk.shutil.disk_usage(".")
    with monkeypatch.context() as patch:
        patch.setattr(disk.shutil, "disk_usage", lambda folder: usage._replace(free=10))
        with pytest.raises(ValueError, match="bytes are needed in .*data, but 10 are free: make room and run again"):
            weights.run("inception")
    assert not list(Path("data").iterdir())
    weights.run("inception")


def test_another_name_is_refused():
    with pytest.raises(ValueError, match="unknown evaluator 'inceptoin': did you mean 'inception'"):
        weights.run("inceptoin")
