"""Cells are the same however they are computed, survive being killed, and refuse bad input without a trace."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import baselines.nearest
from benchmarks.runtime import files, manifest, workspace
from benchmarks.runtime.devices import device_of
from benchmarks.runtime.workspace import MeasuredWorkspace
from benchmarks.stages import _units
from benchmarks.stages import generate as stage
from benchmarks.stages._setup import draw_noise
from benchmarks.suite import params
from benchmarks.suite.fields import read
from benchmarks.suite.outcome import Outcome
from benchmarks.suite.record import Cell
from tests.benchmarks.tiny_suite import arguments
from tfmq.checkpoint import load_quantized

ROW = Path("work/cells/toy/tfmq")
CELL = ROW / "w4a8"
WEIGHTS = Path("data/toy/unet/diffusion_pytorch_model.safetensors")


def contents(folder: Path) -> dict[str, object]:
    """All that a row's cells have, without what differs from run to run: times and memory."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and files.IMAGES in path.parts or path.name == files.ERRORS:
            found[name] = path.read_bytes()
        elif path.name == files.QUANTIZED:
            found[name] = {key: tensor.numpy().tobytes() for key, tensor in load_file(path).items()}
        elif path.is_file():
            outcome = outcome_of(path)
            found[name] = [outcome.settings, outcome.inputs, spent(path)]
    return found


def outcome_of(path: Path = CELL / files.OUTCOME) -> Outcome:
    return read(Outcome, files.read_json(path), path.name)


def spent(path: Path = CELL / files.OUTCOME) -> list[tuple[str, int, int]]:
    """Of each pass: its name, evaluations and optimiser steps."""
    passes = outcome_of(path).made.quantized.passes
    return [(each.name, each.unet_evaluations, each.optimizer_steps) for each in passes]


def learned() -> list[Path]:
    """The files of units of learning, for all cells that begin alike."""
    return sorted(files.LEARNED.rglob("*.safetensors"))


def leftovers() -> list[Path]:
    return list(Path("work").rglob(".*"))


def unfinished() -> list[Path]:
    return [path for path in Path(".resume").rglob("*") if path.is_file()]


def start(root: Path, *command: str) -> subprocess.Popen:
    """Run a stage in a process of its own, where it may have workers."""
    return subprocess.Popen([sys.executable, "-m", "benchmarks", *command], env=os.environ | {"PYTHONPATH": str(root)})


def test_one_process_and_two_give_identical_bytes(suite, generate, root):
    assert generate("tfmq") == (0, [])
    alone = contents(ROW)
    assert {name.split("/")[0] for name in alone} == {"w4a8", "w4a32"}
    units = learned()
    shutil.rmtree(files.LEARNED)
    assert start(root, *arguments("generate", "tfmq", shards=2)).wait() == 0
    assert contents(ROW) == alone and learned() == units
    assert not unfinished() and not leftovers()


def test_a_cell_has_its_images_errors_checkpoint_and_outcome(suite, generate):
    generate("tfmq", "w4a8")
    assert [path.name for path in ROW.iterdir()] == ["w4a8"]
    assert sorted(path.name for path in (CELL / files.IMAGES).iterdir()) == [f"0000{i}.safetensors" for i in range(3)]
    assert all(set(load_file(path)) == {"images"} for path in (CELL / files.IMAGES).iterdir())
    images = files.read_images(Cell("toy", "tfmq", "w4a8"))
    assert images.shape == (6, 3, 32, 32) and images.first(6).dtype == torch.uint8
    errors = load_file(CELL / files.ERRORS)
    assert errors["trajectory"].shape == (2, 3) and errors["temporal"].shape[0] == 3
    outcome = outcome_of()
    made, quantized = outcome.made, outcome.made.quantized
    assert sum(each.optimizer_steps for each in quantized.passes) > 0
    names = ["weight ranges", "temporal reconstruction", "block reconstruction"]
    names += ["finite set calibration", "activation ranges"]
    assert [each.name for each in quantized.passes] == names
    assert all(each.seconds > 0 for each in quantized.passes)
    assert quantized.peak_memory_mib > 100 and made.environment["threads"] == 1
    assert 0 < quantized.size_mib < 0.5 * quantized.full_precision_size_mib
    assert outcome.settings["iterations"] == 2 and len(outcome.inputs) == 3
    assert made.images == files.sha256_folder(CELL / files.IMAGES)
    assert load_quantized(CELL / files.QUANTIZED).step_tracker.steps.tolist() == [1, 334, 667]


@pytest.mark.parametrize(
    ("progress", "shards"), [(files.QUANTIZED, 2), ("part-00000.safetensors", 1), ("part-00002.safetensors", 2)]
)
def test_a_run_killed_anywhere_continues_to_the_same_bytes(suite, generate, root, progress, shards):
    process = start(root, *arguments("generate", "tfmq", shards=shards))
    deadline = time.monotonic() + 120
    while not list(Path(".resume").rglob(progress)) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    process.wait()
    for path in Path(".resume").rglob("*.lock"):
        with path.open() as lock:  # its workers hold it too, until they have seen that it is dead
            fcntl.flock(lock, fcntl.LOCK_EX)
    kept = {path for path in unfinished() if not path.name.startswith(".")}
    done = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "do", lambda unit, do=stage.do: (done.append(unit[0].folder / unit[1]), do(unit)))
        assert generate("tfmq") == (0, [])
    resumed = contents(ROW)
    assert kept or ROW.exists()
    assert not kept & set(done)
    shutil.rmtree(files.LEARNED)
    assert generate("tfmq") == (0, [])
    assert contents(ROW) == resumed and not unfinished()


# The command line in a process that kills itself with the fifth unit of learning in its workspace.
KILLED = """
import os, signal, sys
from benchmarks.__main__ import main
from benchmarks.runtime.workspace import MeasuredWorkspace

def put(self, address, tensors, put=MeasuredWorkspace.put):
    put(self, address, tensors)
    if len(list(self.folder.iterdir())) == 5:
        os.kill(os.getpid(), signal.SIGKILL)

MeasuredWorkspace.put = put
main(sys.argv[1:])
"""


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Path], list[Path]]:
    """The units that are taken from the workspace, and those that are put there, in their order."""
    taken, put = [], []

    class Noting(MeasuredWorkspace):
        def get(self, address: str) -> dict[str, torch.Tensor] | None:
            tensors = super().get(address)
            if tensors is not None:
                taken.append(self._path(address))
            return tensors

        def put(self, address: str, tensors: dict[str, torch.Tensor]) -> None:
            put.append(self._path(address))
            super().put(address, tensors)

    monkeypatch.setattr(_units, "MeasuredWorkspace", Noting)
    return taken, put


def test_a_quantisation_that_is_killed_goes_on_at_the_block(suite, generate, root, noted):
    taken, put = noted
    assert generate("tfmq", "w4a8") == (0, [])
    whole, units = contents(ROW), list(put)
    assert sorted(units) == learned() and len(units) > 5 and not taken
    shutil.rmtree(ROW)
    shutil.rmtree(files.LEARNED)
    command = [sys.executable, "-c", KILLED, *arguments("generate", "tfmq", "w4a8")]
    assert subprocess.run(command, env=os.environ | {"PYTHONPATH": str(root)}).returncode == -signal.SIGKILL
    assert learned() == sorted(units[:5]) and not ROW.exists()
    put.clear()
    assert generate("tfmq", "w4a8") == (0, [])
    assert (taken, put) == (units[:5], units[5:])
    assert contents(ROW) == whole and not unfinished() and not leftovers()


def test_a_quantisation_that_went_on_has_the_cost_of_a_whole_one(suite, generate, monkeypatch):
    assert generate("tfmq", "w4a8") == (0, [])
    whole = spent()
    shutil.rmtree(files.LEARNED)
    puts = []

    class Stopping(MeasuredWorkspace):
        def put(self, address: str, tensors: dict[str, torch.Tensor]) -> None:
            super().put(address, tensors | {"seconds": torch.tensor(1000.0)})
            puts.append(address)
            if len(puts) == 5:
                raise OSError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(_units, "MeasuredWorkspace", Stopping)
        patch.setattr(workspace, "peak_memory", lambda device: 1e6)
        assert generate("tfmq", "w4a8") == (1, ["error: toy/tfmq/w4a8: stopped"])
    assert len(learned()) == 5
    assert generate("tfmq", "w4a8") == (0, [])
    assert spent() == whole
    quantized = outcome_of().made.quantized
    seconds = {each.name: each.seconds for each in quantized.passes}
    assert seconds.pop("temporal reconstruction") > 1000 and seconds.pop("block reconstruction") > 4000
    assert sum(seconds.values()) < 1000
    assert quantized.peak_memory_mib == 1e6


def test_damage_to_what_was_learned_is_one_line(suite, generate, monkeypatch):
    def stop(work: stage.Work, *given: object) -> None:
        raise OSError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(_units, "save_quantized", stop)
        assert generate("tfmq", "w4a8")[0] == 1
    damaged = learned()[1]
    damaged.write_bytes(damaged.read_bytes()[:50])
    code, lines = generate("tfmq", "w4a8")
    assert code == 1 and len(lines) == 1 and f"{damaged} is damaged" in lines[0]
    assert "delete it, and it is learned again" in lines[0] and not ROW.exists()
    damaged.unlink()
    assert generate("tfmq", "w4a8") == (0, [])
    assert damaged.exists()


def test_what_other_code_has_learned_is_not_taken(suite, generate, monkeypatch, noted):
    taken, put = noted
    with monkeypatch.context() as patch:
        patch.setattr("tfmq.session.code_hash", lambda *entries: "other code")
        assert generate("tfmq", "w4a8") == (0, [])
    others, cell = learned(), contents(ROW)
    put.clear()
    assert generate("tfmq", "w4a8") == (0, [])
    assert contents(ROW) == cell
    assert not taken and len(put) == len(others) and not set(put) & set(others)


def test_cells_that_begin_alike_learn_that_once(suite, generate, noted, monkeypatch):
    """Roundings do not depend on the width of activations; step sizes do."""
    document = yaml.safe_load(Path("params.yaml").read_text())
    document["methods"]["tfmq"]["activation_iterations"] = 3
    document["tables"]["leaderboard"]["precisions"] = ["w4a8", "w4a4"]
    Path("params.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    alone = suite.with_name("alone")
    shutil.copytree(suite, alone)
    taken, put = noted
    assert generate("tfmq", "w4a8") == (0, [])
    units = {name: steps // (3 if name == "step sizes" else 2) for name, _, steps in spent()}
    shared = units["temporal reconstruction"] + units["block reconstruction"]
    assert units["temporal reconstruction"] == 1 < units["step sizes"] < shared
    assert len(learned()) == shared + units["step sizes"]
    first = put[:shared]
    put.clear()
    assert generate("tfmq", "w4a4") == (0, [])
    assert taken == first and len(learned()) == shared + 2 * units["step sizes"]
    assert len(put) == units["step sizes"]
    both = contents(ROW)
    monkeypatch.chdir(alone)
    assert generate("tfmq", "w4a4") == (0, [])
    own = contents(ROW)
    assert own == {name: content for name, content in both.items() if name.startswith("w4a4/")}
    assert sum(name.startswith(f"w4a4/{files.IMAGES}/") for name in own) == 3


def test_cells_that_begin_like_another_one_come_last(suite):
    task = params.load(Path("params.yaml")).tasks["toy"]

    def works(*names: str) -> list[stage.Work]:
        cells = []
        for name in names:
            row, precision = name.split("/")
            method, _, protocol = row.partition("-")
            precision, _, seed = precision.partition("-s")
            cells.append(Cell("toy", method, precision, int(seed or 0), protocol or "shared"))
        return [stage.Work(task, cell, "cpu", Path(), {}, {}, {}) for cell in cells]

    def order(*names: str) -> list[str]:
        return [work.cell.name.removeprefix("toy/") for work in stage._shared_last(works(*names))]

    assert order() == []
    # Nothing is shared with other widths of weights, seeds and layers, and by other rows.
    apart = ["full_precision/w32a32", "nearest/w4a8", "tfmq/w8a8", "tfmq/w4a8", "tfmq/w4a8-s1"]
    apart += ["tfmq-published/w4a8", "freeze/w4a8"]
    assert order(*apart) == apart and order(*reversed(apart)) == apart[::-1]
    assert order("tfmq/w4a8", "tfmq/w4a6", "tfmq/w4a4", "nearest/w4a8", "tfmq/w4a32", "tfmq/w8a8") == [
        "tfmq/w4a8",
        "nearest/w4a8",
        "tfmq/w8a8",
        "tfmq/w4a6",
        "tfmq/w4a4",
        "tfmq/w4a32",
    ]
    # Rows that differ in activations alone begin alike.
    assert order("temporal_feature_matters/w4a8", "tfmq/w4a8", "nearest/w4a8") == [
        "temporal_feature_matters/w4a8",
        "nearest/w4a8",
        "tfmq/w4a8",
    ]


@pytest.mark.parametrize("of", ["settings", "code"])
def test_unfinished_work_of_other_settings_or_code_is_superseded(suite, generate, monkeypatch, of):
    def stop(work: stage.Work) -> None:
        raise OSError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(stage, "_finish", stop)
        assert generate("tfmq", "w4a8")[0] == 1
    (old,) = Path(".resume/toy/tfmq").iterdir()
    if of == "settings":
        text = Path("params.yaml").read_text()
        Path("params.yaml").write_text(text.replace("temporal_iterations: 2", "temporal_iterations: 3"))
    else:
        monkeypatch.setattr(stage, "code_hash", lambda *entries: "other code")
    assert generate("tfmq", "w4a8") == (0, [])
    assert not old.exists() and not unfinished()
    assert outcome_of().settings["temporal_iterations"] == (3 if of == "settings" else 2)


def test_a_cell_that_fails_stops_no_other_one(suite, generate, monkeypatch):
    def fail(unet, precision, *rest):
        if precision.quantizes_activations:
            raise ValueError("activations are too much")
        return quantize(unet, precision, *rest)

    quantize = _units.quantize_
    with monkeypatch.context() as patch:
        patch.setattr(_units, "quantize_", fail)
        assert generate("nearest") == (1, ["error: toy/nearest/w4a8: activations are too much"])
    row = Path("work/cells/toy/nearest")
    assert [path.name for path in row.iterdir()] == ["w4a32"]
    before = contents(row)
    kept = {path: path.stat().st_mtime_ns for path in unfinished()}
    assert kept
    done = []
    monkeypatch.setattr(stage, "do", lambda unit, do=stage.do: (done.append(unit[0].cell.precision), do(unit)))
    assert generate("nearest") == (0, [])
    assert set(done) == {"w4a8"} and not unfinished()
    assert before.items() <= contents(row).items()


def test_every_image_has_its_own_noise_whatever_the_batch(suite):
    task = params.load(Path("params.yaml")).tasks["toy"]
    start, steps = draw_noise(task, "sample", 0, range(6), (3, 8, 8))
    later_start, later_steps = draw_noise(task, "sample", 0, range(4, 6), (3, 8, 8))
    assert torch.equal(start[4:], later_start) and torch.equal(steps[:, 4:], later_steps)
    other = draw_noise(task, "sample", 1, range(6), (3, 8, 8))[0]
    reference = draw_noise(task, "reference", 0, range(6), (3, 8, 8))[0]
    assert not torch.equal(start, other) and not torch.equal(start, reference)


def change(words: list[str], **changes: str) -> list[str]:
    """A command line with other values of some options."""
    for option, value in changes.items():
        words[words.index(f"--{option}") + 1] = value
    return words


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "toi"}, "unknown task 'toi': did you mean 'toy'?"),
        ({"method": "tfmqq"}, "unknown method 'tfmqq': did you mean 'tfmq'?"),
        ({"precision": "w4a9"}, "unknown precision 'w4a9': did you mean 'w4a8'?"),
        ({"table": "leader"}, "unknown table 'leader': did you mean 'leaderboard'?"),
    ],
)
def test_unknown_names_are_one_line_with_the_nearest(suite, run, changes, message):
    code, lines = run(*change(arguments("generate", "tfmq", "w4a8"), **changes))
    assert code == 1 and len(lines) == 1 and message in lines[0]
    assert not unfinished()


def test_rows_need_a_table_and_devices_have_names(suite, run):
    assert "--table is missing: give one of" in run("generate", "--task", "toy", "--method", "tfmq")[1][0]
    with pytest.raises(SystemExit):
        run("generate", "--task", "toy", "--method", "full_precision", "--shards", "0")
    with pytest.raises(ValueError, match="unknown device 'gpu'"):
        device_of("gpu")


def test_rows_of_a_table_are_made_together(suite, run):
    table = ("--table", "published", "--shards", "1")
    for stage_name in ("generate", "score"):
        assert run(stage_name, *table) == (0, [])
    rows = [f"{method}-published" for method in ("nearest", "tfmq")]
    assert sorted(path.parent.name for path in Path("results/records/toy").glob("*/w4a8.json")) == rows
    assert "unknown task 'toi': did you mean 'toy'?" in run("generate", "--task", "toy", "toi", *table)[1][0]


def test_settings_that_a_method_does_not_have_are_found_by_the_first_stage(suite, run):
    document = yaml.safe_load(Path("params.yaml").read_text())
    document["methods"]["tfmq"]["iteration"] = 3
    Path("params.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    code, lines = run("calibrate", "--task", "toy", "--shards", "1")
    assert code == 1 and "unknown key in methods.tfmq 'iteration': did you mean 'iterations'?" in lines[0]


def test_settings_that_are_no_yaml_or_missing_are_one_line(suite, run):
    Path("params.yaml").write_text("tasks: [")
    code, lines = run("tables")
    assert code == 1 and len(lines) == 1 and "params.yaml is not valid YAML" in lines[0]
    Path("params.yaml").unlink()
    assert "run from the repository's root" in run("tables")[1][0]


@pytest.mark.parametrize("content", ['{"a"', "[1, 2]"])
def test_a_damaged_manifest_is_one_line(suite, generate, content):
    Path("data/toy/manifest.json").write_text(content)
    code, lines = generate("tfmq")
    assert code == 1 and len(lines) == 1 and "manifest.json is damaged: delete it and run `dvc pull" in lines[0]


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
    damage(WEIGHTS)
    code, lines = generate("tfmq")
    assert code == 1 and len(lines) == 1 and message in lines[0]
    assert not ROW.exists() and not unfinished() and not leftovers()


def test_nan_weights_are_one_line_a_cell_and_leave_no_result(suite, generate):
    tensors = load_file(WEIGHTS)
    tensors["conv_in.weight"][0, 0, 0, 0] = float("nan")
    save_file(tensors, WEIGHTS, {"format": "pt"})
    manifest.write(Path("data/toy"))
    message = "conv_in.weight holds NaN or infinity: the checkpoint is damaged, fetch or convert it again"
    assert generate("nearest") == (1, [f"error: toy/nearest/{precision}: {message}" for precision in ("w4a32", "w4a8")])
    assert not Path("work/cells/toy/nearest").exists() and not leftovers()


def test_constant_activations_are_one_line(suite, generate):
    tensors = load_file(WEIGHTS)
    tensors["time_embedding.linear_1.weight"].zero_()
    tensors["time_embedding.linear_1.bias"].zero_()
    save_file(tensors, WEIGHTS, {"format": "pt"})
    manifest.write(Path("data/toy"))
    code, lines = generate("nearest", "w4a8")
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
    code, lines = generate("nearest", "w4a8")
    assert code == 1 and lines == ["error: toy/nearest/w4a8: [Errno 28] No space left on device"]
    assert not Path("work/cells/toy/nearest").exists()
    assert not unfinished() and not leftovers()


def test_an_unwritable_place_is_one_line(suite, generate):
    Path("work/cells/toy").rename("work/cells/kept")
    Path("work/cells/toy").write_text("a file where a folder should be")
    code, lines = generate("full_precision")
    assert code == 1 and len(lines) == 1 and "work/cells/toy" in lines[0]


def test_a_method_that_does_not_apply_says_why(suite, generate, score, monkeypatch):
    declined = dataclasses.replace(baselines.nearest.METHOD, objection=lambda precision: "it is for 8 bits only")
    monkeypatch.setattr(baselines.nearest, "METHOD", declined)
    assert generate("nearest", "w4a8") == (0, [])
    record = score("nearest", "w4a8")["w4a8"]
    assert (record.status, record.reason) == ("not applicable", "it is for 8 bits only")


def test_the_published_protocol_is_the_methods_own_or_does_not_apply(suite, generate, score):
    assert generate("tfmq", table="published") == (0, [])
    record = score("tfmq", table="published")["w4a8"]
    assert record.protocol == "published" and record.cell.name == "toy/tfmq-published/w4a8"
    assert any("published" in reason for reason in record.coverage["not_quantized"])
    assert not ROW.exists()
    assert generate("nearest", table="published") == (0, [])
    record = score("nearest", table="published")["w4a8"]
    assert (record.status, record.reason) == ("not applicable", "no choice of layers of its own is known")


def test_rows_that_do_not_fit_in_memory_wait_on_the_disk(suite, generate, monkeypatch):
    assert generate("tfmq", "w4a8") == (0, [])
    before, units = contents(ROW), learned()
    shutil.rmtree(files.LEARNED)
    allocated = []
    monkeypatch.setattr(files, "mapped", lambda *given, make=files.mapped: (allocated.append(given), make(*given))[1])
    document = yaml.safe_load(Path("params.yaml").read_text())
    document["methods"]["tfmq"]["memory_gib"] = 1e-6
    Path("params.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    assert generate("tfmq", "w4a8") == (0, [])
    after = contents(ROW)
    for name in before:
        assert before[name] == after[name] or name.endswith(files.OUTCOME)
    assert allocated and not unfinished()
    assert learned() == units, "where rows wait decides nothing of what is learned"
