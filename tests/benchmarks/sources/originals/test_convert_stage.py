"""The stage that converts: from downloads to a task's folder, whole or not at all."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks.runtime import manifest
from benchmarks.sources.originals.architectures import ARCHITECTURES, TASKS
from benchmarks.stages import _setup, convert
from benchmarks.stages import fetch as fetch_stage
from benchmarks.suite import params
from tests.benchmarks.sources.originals import tiny

TASK = {
    "version": 1,
    "family": "ldm",
    "dataset": "emoji",
    "data": "images",
    "resolution": 32,
    "scheduler": "ddim",
    "steps": 4,
    "eta": 0.0,
    "guidance_scale": 1.0,
    "images": 2,
    "batch": 2,
    "calibration_images": 2,
    "reference_images": 0,
    "evaluator": "inception",
}
SOURCE = {"urls": ["https://example.org/file"], "page": "https://example.org", "licence": "none"}
BEDROOMS, CHURCHES, COCO, XL = "lsun-bedrooms-ldm4", "lsun-churches-ldm8", "coco-sd-v1-4", "coco-sdxl"
SUFFIXES = {BEDROOMS: ".zip", CHURCHES: ".zip", XL: ".safetensors"}


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """A suite's folder with sources of all tasks, in which nothing is fetched."""
    monkeypatch.chdir(tmp_path)
    files = {name: f"{name}{SUFFIXES.get(name, '.ckpt')}" for name in TASKS}
    files |= {"clip-vocabulary": "clip-vocab.json", "clip-merges": "clip-merges.txt"}
    sources = {name: SOURCE | {"file": file} for name, file in files.items()}
    for name in TASKS:
        if files[name].endswith(".zip"):
            sources[name] |= {"member": "model.ckpt"}
    Path("sources.yaml").write_text(yaml.safe_dump(sources), encoding="utf-8")
    tasks = {}
    for name, architecture in TASKS.items():
        tasks[name] = TASK | {"family": ARCHITECTURES[architecture].family, "checkpoint": f"data/{name}"}
    tasks[COCO] |= {"scheduler": "pndm", "prompts": "prompts", "guidance_scale": 7.5}
    tasks[XL] |= {"scheduler": "euler", "prompts": "prompts", "guidance_scale": 5.0}
    tasks["cifar10-ddim"] |= {"scheduler": "ddim_quad"}
    tasks["toy"] = TASK | {"checkpoint": "data/toy"}
    return params.parse({"name": "suite", "tasks": tasks, "tables": {}, "methods": {}})


def fetch(task: str, seed: int = 0) -> Path:
    path = Path("downloads") / f"{task}{SUFFIXES.get(task, '.ckpt')}"
    tiny.write_original(TASKS[task], path, seed)
    return path


def entries() -> list[str]:
    return sorted(str(path.relative_to("data")) for path in Path("data").rglob("*") if path.is_file())


def test_a_task_gets_the_folder_that_it_is_loaded_from(suite, capsys):
    fetch(CHURCHES)
    convert.run(suite, CHURCHES)
    assert (
        "lsun-churches-ldm8: data/lsun-churches-ldm8, the LDM-8 LSUN-Churches of downloads/" in capsys.readouterr().out
    )
    assert entries() == [
        f"{CHURCHES}/{name}"
        for name in (
            "manifest.json",
            "scheduler/scheduler_config.json",
            "unet/config.json",
            "unet/diffusion_pytorch_model.safetensors",
            "vqvae/config.json",
            "vqvae/diffusion_pytorch_model.safetensors",
        )
    ]
    model = _setup.load_model(suite.tasks[CHURCHES], torch.device("cpu"))
    size = ARCHITECTURES[TASKS[CHURCHES]].tiny
    assert model.latent_shape == (size.unet["in_channels"], *[size.unet["sample_size"]] * 2)
    assert {attention.heads for attention in model.unet.mid_block.attentions} == {size.heads}


@pytest.mark.parametrize("task", [COCO, XL])
def test_text_to_image_gets_its_tokenizers(suite, task):
    fetch(task)
    tiny.write_tokenizer(Path("downloads/clip-vocab.json"), Path("downloads/clip-merges.txt"))
    convert.run(suite, task)
    model = _setup.load_model(suite.tasks[task], torch.device("cpu"))
    found = model.conditioning(["a cat", "a dog"])
    size = ARCHITECTURES[TASKS[task]].tiny
    towers = [tower for tower in (size.text_encoder, size.second_text_encoder) if tower is not None]
    tokens, width = towers[0]["max_position_embeddings"], sum(tower["hidden_size"] for tower in towers)
    assert found.context.shape == (2, tokens, width)
    assert not torch.allclose(found.context[0], found.context[1])


def test_the_pixel_model_gets_its_own_time_steps(suite):
    fetch("cifar10-ddim")
    convert.run(suite, "cifar10-ddim")
    model = _setup.load_model(suite.tasks["cifar10-ddim"], torch.device("cpu"))
    model.scheduler.set_timesteps(4)
    assert model.scheduler.timesteps.tolist() == [800, 355, 88, 0]


def test_what_fails_leaves_the_folder_of_before(suite):
    fetch(CHURCHES)
    convert.run(suite, CHURCHES)
    before = {name: (Path("data") / name).read_bytes() for name in entries()}
    path = fetch(CHURCHES, seed=1)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=f"downloads/{CHURCHES}.zip is not {CHURCHES}: .*fetch --source"):
        convert.run(suite, CHURCHES)
    tiny.write_original("ldm4", path)
    line = f"downloads/{CHURCHES}.zip is not {CHURCHES}: it is a checkpoint of unconditional LDM-4 .*: delete it"
    with pytest.raises(ValueError, match=line):
        convert.run(suite, CHURCHES)
    assert {name: (Path("data") / name).read_bytes() for name in entries()} == before
    fetch(CHURCHES, seed=1)
    convert.run(suite, CHURCHES)
    assert entries() == sorted(before)
    assert (Path("data") / CHURCHES / manifest.NAME).read_bytes() != before[f"{CHURCHES}/{manifest.NAME}"]


def test_a_wrong_first_copy_can_be_replaced(suite):
    tiny.write_original("ldm4", Path("theirs.zip"))
    fetch_stage.run(CHURCHES, Path("theirs.zip"))
    line = f"zip is not {CHURCHES}: it is a checkpoint of .*: delete it and its entry in fetched.json and run"
    with pytest.raises(ValueError, match=line):
        convert.run(suite, CHURCHES)
    tiny.write_original(TASKS[CHURCHES], Path("ours.zip"))
    with pytest.raises(ValueError, match="of the first copy: remove its entry only if that was a wrong one"):
        fetch_stage.run(CHURCHES, Path("ours.zip"))
    Path("fetched.json").unlink()
    fetch_stage.run(CHURCHES, Path("ours.zip"))
    convert.run(suite, CHURCHES)


def test_what_changed_since_it_was_fetched_is_not_converted(suite):
    name = "cifar10-ddim"  # whose format has no checksums of its own
    path = fetch(name)
    fetch_stage.run(name, path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"ckpt is not {name}: its SHA-256 is .*: delete it and run .*{name}`"):
        convert.run(suite, name)
    assert not Path("data").exists()


def test_what_a_killed_run_left_is_removed(suite):
    fetch(CHURCHES)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for process in (dead.pid, os.getppid()):
        (Path("data") / f".{CHURCHES}.{process}" / "unet").mkdir(parents=True)
    convert.run(suite, CHURCHES)
    assert sorted(os.listdir("data")) == [f".{CHURCHES}.{os.getppid()}", CHURCHES]


def test_what_is_not_fetched_is_named(suite):
    line = f"downloads/{CHURCHES}.zip is missing: run `python -m benchmarks fetch --source {CHURCHES}`"
    with pytest.raises(ValueError, match=line):
        convert.run(suite, CHURCHES)
    fetch(COCO)
    with pytest.raises(ValueError, match="downloads/clip-vocab.json is missing: run .* --source clip-vocabulary`"):
        convert.run(suite, COCO)
    assert not Path("data").exists() or not os.listdir("data")


def test_a_task_without_an_original_is_refused(suite):
    with pytest.raises(ValueError, match="unknown original of task 'toy'"):
        convert.run(suite, "toy")
    with pytest.raises(ValueError, match="unknown task 'lsun-church-ldm8': did you mean 'lsun-churches-ldm8'"):
        convert.run(suite, "lsun-church-ldm8")
    tasks = suite.tasks | {CHURCHES: dataclasses.replace(suite.tasks[CHURCHES], family="ddpm")}
    with pytest.raises(ValueError, match="has family ddpm, but its original is one of ldm"):
        convert.run(dataclasses.replace(suite, tasks=tasks), CHURCHES)


def test_every_task_of_the_paper_suite_that_samples_a_published_model_has_an_original(root):
    document = yaml.safe_load((root / "benchmarks" / "paper" / "params.yaml").read_text(encoding="utf-8"))
    sources = yaml.safe_load((root / "benchmarks" / "paper" / "sources.yaml").read_text(encoding="utf-8"))
    assert document["tasks"].keys() == TASKS.keys() <= sources.keys()
    for name, task in document["tasks"].items():
        assert task["family"] == ARCHITECTURES[TASKS[name]].family
        assert task["checkpoint"] == f"data/{name}"
        assert (sources[name].get("member") is not None) == sources[name]["file"].endswith(".zip")
    assert set(convert.TOKENIZER) <= sources.keys()
