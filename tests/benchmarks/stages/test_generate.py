"""Cells are the same however they are sampled, survive being killed, and refuse bad input without a trace."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.stages import files
from benchmarks.stages import generate as stage
from benchmarks.stages.setup import device_of
from tfmq.checkpoint import load_quantized

CELL = Path("work/cells/toy-tfmq-w4a8")
MEASURED = (stage.IMAGES, stage.ERRORS)


def contents(folder: Path, names: tuple[str, ...] = MEASURED) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names}


def leftovers() -> list[Path]:
    return list(Path("work").rglob(".*"))


def test_one_process_and_two_shards_give_identical_bytes(suite, generate):
    assert generate("tfmq") == (0, [])
    alone = contents(CELL)
    assert generate("tfmq", shards=2) == (0, [])
    assert contents(CELL) == alone
    assert not list(Path(".resume").iterdir()) and not leftovers()


def test_a_cell_has_its_images_errors_checkpoint_and_outcome(suite, generate):
    generate("tfmq")
    images = load_file(CELL / stage.IMAGES)["images"]
    assert images.shape == (6, 3, 32, 32) and images.dtype == torch.uint8
    errors = load_file(CELL / stage.ERRORS)
    assert errors["trajectory"].shape == (2, 3) and errors["temporal"].shape[0] == 3
    outcome = json.loads((CELL / stage.OUTCOME).read_text())
    assert outcome["effort"]["optimizer_steps"] > 0
    assert set(outcome["seconds"]) == {"weights", "activations"}
    assert 0 < outcome["size_mib"] < 0.5 * outcome["full_precision_size_mib"]
    assert outcome["settings"]["iterations"] == 2 and len(outcome["inputs"]) == 3
    assert load_quantized(CELL / stage.QUANTIZED).step_tracker.steps.tolist() == [1, 334, 667]


@pytest.mark.parametrize("progress", ["quantized.safetensors", "part-00000.safetensors", "part-00002.safetensors"])
def test_a_run_killed_anywhere_continues_to_the_same_bytes(suite, generate, root, progress):
    arguments = ("generate", "--task", "toy", "--method", "tfmq", "--precision", "w4a8", "--shards", "1")
    variables = os.environ | {"PYTHONPATH": str(root)}
    process = subprocess.Popen([sys.executable, "-m", "benchmarks", *arguments], env=variables)
    deadline = time.monotonic() + 120
    while not list(Path(".resume").glob(f"*/{progress}")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    process.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in Path(".resume").glob("*/*.safetensors")}
    assert generate("tfmq") == (0, [])
    resumed = contents(CELL, (*MEASURED, stage.QUANTIZED))
    assert kept or CELL.exists()
    assert generate("tfmq") == (0, [])
    assert contents(CELL) == {name: resumed[name] for name in MEASURED}


def test_unfinished_work_of_other_settings_is_dropped(suite, generate, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(stage, "_finish", lambda *arguments: None)
        generate("tfmq")
    (unfinished,) = Path(".resume").iterdir()
    text = Path("params.yaml").read_text()
    Path("params.yaml").write_text(text.replace("temporal_iterations: 2", "temporal_iterations: 3"))
    assert generate("tfmq") == (0, [])
    assert not unfinished.exists()
    assert json.loads((CELL / stage.OUTCOME).read_text())["settings"]["temporal_iterations"] == 3


def test_every_image_has_its_own_noise_whatever_the_batch(suite):
    from benchmarks import params
    from benchmarks.stages.setup import draw_noise

    task = params.load(Path("params.yaml")).tasks["toy"]
    start, steps = draw_noise(task, "sample", 0, range(6), (3, 8, 8))
    later_start, later_steps = draw_noise(task, "sample", 0, range(4, 6), (3, 8, 8))
    assert torch.equal(start[4:], later_start) and torch.equal(steps[:, 4:], later_steps)
    other = draw_noise(task, "sample", 1, range(6), (3, 8, 8))[0]
    reference = draw_noise(task, "reference", 0, range(6), (3, 8, 8))[0]
    assert not torch.equal(start, other) and not torch.equal(start, reference)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--task", "toi", "--method", "tfmq", "--precision", "w4a8"), "unknown task 'toi': did you mean 'toy'?"),
        (("--task", "toy", "--method", "tfmqq", "--precision", "w4a8"), "unknown method 'tfmqq': did you mean 'tfmq'?"),
        (
            ("--task", "toy", "--method", "tfmq", "--precision", "w4a9"),
            "unknown precision 'w4a9': did you mean 'w4a8'?",
        ),
    ],
)
def test_unknown_names_are_one_line_with_the_nearest(suite, run, arguments, message):
    code, lines = run("generate", *arguments)
    assert code == 1 and len(lines) == 1 and message in lines[0]
    assert not Path(".resume").exists() or not list(Path(".resume").iterdir())


def test_full_precision_has_one_precision_and_devices_have_names(suite, run):
    arguments = ("generate", "--task", "toy", "--method", "full_precision", "--precision", "w4a8")
    assert run(*arguments)[1] == ["error: full_precision is w32a32, not w4a8: leave the precision out"]
    with pytest.raises(ValueError, match="unknown device 'gpu'"):
        device_of("gpu")


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "diffusion_pytorch_model.safetensors is missing: run `dvc pull data.dvc`"),
        (_truncate, "diffusion_pytorch_model.safetensors is damaged"),
        (_flip_a_bit, "diffusion_pytorch_model.safetensors is damaged"),
    ],
)
def test_damaged_checkpoints_are_one_line_and_leave_nothing(suite, generate, damage, message):
    damage(Path("data/toy/unet/diffusion_pytorch_model.safetensors"))
    code, lines = generate("tfmq")
    assert code == 1 and len(lines) == 1 and message in lines[0]
    assert not CELL.exists() and not list(Path().glob(".resume/*")) and not leftovers()


def test_nan_weights_are_one_line_and_leave_no_result(suite, generate):
    from benchmarks import manifest

    path = Path("data/toy/unet/diffusion_pytorch_model.safetensors")
    tensors = load_file(path)
    tensors["conv_in.weight"][0, 0, 0, 0] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    manifest.write(Path("data/toy"))
    code, lines = generate("nearest")
    assert code == 1 and lines == [
        "error: conv_in.weight holds NaN or infinity: the checkpoint is damaged, fetch or convert it again"
    ]
    assert not Path("work/cells/toy-nearest-w4a8").exists() and not leftovers()


def test_constant_activations_are_one_line(suite, generate):
    from benchmarks import manifest

    path = Path("data/toy/unet/diffusion_pytorch_model.safetensors")
    tensors = load_file(path)
    tensors["time_embedding.linear_1.weight"].zero_()
    tensors["time_embedding.linear_1.bias"].zero_()
    save_file(tensors, path, {"format": "pt"})
    manifest.write(Path("data/toy"))
    code, lines = generate("nearest")
    assert code == 1 and len(lines) == 1
    assert "the activation at time_embedding.linear_2.input_quantizer is constant (0)" in lines[0]


@pytest.mark.parametrize("name", ["pool", "trajectory"])
def test_missing_inputs_say_what_makes_them(suite, generate, name):
    for path in Path("work").rglob(f"{name}.safetensors"):
        path.unlink()
    code, lines = generate("tfmq")
    assert code == 1 and len(lines) == 1 and "is missing: run `dvc repro`" in lines[0]


def test_a_full_disk_is_one_line_and_leaves_no_half_file(suite, generate, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    code, lines = generate("nearest")
    assert code == 1 and lines == ["error: [Errno 28] No space left on device"]
    assert not Path("work/cells/toy-nearest-w4a8").exists()
    assert not list(Path(".resume").glob("*/*")) and not leftovers()


def test_an_unwritable_place_is_one_line(suite, generate):
    Path("work/cells").rename("work/elsewhere")
    Path("work/elsewhere/toy-full_precision-w32a32").rename("kept")
    Path("work/cells").write_text("a file where a folder should be")
    code, lines = generate("full_precision", "w32a32")
    assert code == 1 and len(lines) == 1 and "work/cells" in lines[0]


def test_a_method_that_does_not_apply_says_why(suite, generate, run, monkeypatch):
    import dataclasses

    import baselines.nearest

    declined = dataclasses.replace(baselines.nearest.METHOD, objection=lambda precision: "it is for 8 bits only")
    monkeypatch.setattr(baselines.nearest, "METHOD", declined)
    assert generate("nearest") == (0, [])
    assert run("score", "--task", "toy", "--method", "nearest", "--precision", "w4a8") == (0, [])
    record = json.loads(Path("results/records/toy-nearest-w4a8.json").read_text())
    assert (record["status"], record["reason"]) == ("not applicable", "it is for 8 bits only")


def test_new_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "cell"
    with pytest.raises(RuntimeError), files.new_folder(target) as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
