"""Full precision in TF32, with its check in float32. Its rounding is emulated where the flags of CUDA allow it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from benchmarks.runtime import devices, files
from benchmarks.runtime.images import Images
from benchmarks.stages import _units
from benchmarks.suite.record import FULL_PRECISION, Cell, Record
from tests.tfmq.modules.test_tf32 import tf32

CELL = Cell("toy", FULL_PRECISION, "w32a32")


class TensorCores(TorchFunctionMode):
    """Convolutions and products round what they take, as on tensor cores, while TF32 is let in."""

    def __init__(self) -> None:
        super().__init__()
        self.rounded, self.exact = 0, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.conv2d, F.conv2d, F.linear, torch.matmul, torch.bmm, torch.baddbmm):
            if torch.backends.cudnn.allow_tf32 and torch.backends.cuda.matmul.allow_tf32:
                self.rounded += 1
                args = tuple(tf32(arg) if isinstance(arg, torch.Tensor) and arg.dim() > 1 else arg for arg in args)
            else:
                self.exact += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def float32():
    """As `device_of` leaves CUDA."""
    with devices.tf32(False):
        yield


@pytest.fixture
def switched_on(suite):
    document = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    document["tasks"]["toy"]["tf32"] = True
    Path("params.yaml").write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")


@pytest.fixture
def draw_full(run):
    def row() -> Record:
        for stage in ("generate", "score"):
            arguments = ("--task", "toy", "--method", FULL_PRECISION, "--shards", "1")
            assert run(stage, *arguments) == (0, [])
        return Record.load(files.record_file(CELL))

    return row


def images() -> torch.Tensor:
    return Images(files.cell_folder(CELL) / files.IMAGES).first(6)


def test_images_alone_are_in_tf32_and_the_first_are_drawn_in_both(switched_on, draw_full, generate, monkeypatch):
    monkeypatch.setattr(_units, "has_tf32", lambda device: True)
    before, folder = images(), files.cell_folder(CELL)
    trajectory = files.read_tensors(folder / files.TRAJECTORY)
    with TensorCores() as cores:
        record = draw_full()
    assert cores.rounded and cores.exact
    exact = files.read_tensors(folder / files.FLOAT32)["images"]
    assert torch.equal(exact, before) and not torch.equal(images(), before)
    for name, found in files.read_tensors(folder / files.TRAJECTORY).items():
        assert torch.equal(found, trajectory[name]), "errors are measured along float32's"
    assert record.settings["task"]["tf32"] is True
    told = record.details["tf32"]
    assert told["images"] == 6 and 1e-6 < told["mean"] <= told["largest"] < 0.1
    assert told["feature_distance"]["n"] == 6 and told["feature_distance"]["value"] < 0.1

    with TensorCores() as cores:
        assert generate("nearest", "w4a8") == (0, [])
    assert cores.exact and not cores.rounded, "quantised networks are in float32"


def test_a_check_that_was_stopped_goes_on(switched_on, draw_full, run, monkeypatch):
    monkeypatch.setattr(_units, "has_tf32", lambda device: True)
    draw, drawn = _units._sample_batch, []

    def stopping(work, name):
        drawn.append(name)
        if name == "check-00001.safetensors" and drawn.count(name) == 1:
            raise ValueError("stopped")
        draw(work, name)

    monkeypatch.setattr(_units, "_sample_batch", stopping)
    code, _ = run("generate", "--task", "toy", "--method", FULL_PRECISION, "--shards", "1")
    assert code == 1
    draw_full()
    parts = [f"{kind}-{index:05d}.safetensors" for kind in ("part", "check") for index in range(3)]
    assert sorted(drawn) == sorted([*parts, "check-00001.safetensors"])


def test_without_tf32_nothing_but_the_record_changes(switched_on, draw_full):
    before = images()
    record = draw_full()
    assert record.settings["task"]["tf32"] is True
    assert record.details == {"tf32": {"images": 0, "mean": 0.0, "largest": 0.0, "feature_distance": None}}
    assert torch.equal(images(), before) and not (files.cell_folder(CELL) / files.FLOAT32).exists()


def test_where_it_is_off_records_do_not_know_of_it(suite):
    record = Record.load(files.record_file(CELL))
    assert "tf32" not in record.settings["task"] and record.details == {}


def test_only_cuda_has_it():
    assert not devices.has_tf32(torch.device("cpu")) and not devices.has_tf32(torch.device("meta"))
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    with devices.tf32(True):
        assert all(each.allow_tf32 for each in flags)
    with pytest.raises(ValueError, match="inside"), devices.tf32(True):
        raise ValueError("inside")
    assert not any(each.allow_tf32 for each in flags)
