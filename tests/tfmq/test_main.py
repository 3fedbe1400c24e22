"""The command line of the library: what it prints, what it writes, and its errors in one line."""

from __future__ import annotations

import json

import pytest

from tests.tfmq import networks
from tfmq.__main__ import main
from tfmq.checkpoint import save_quantized
from tfmq.export.roughly import quantize_roughly_
from tfmq.precision import Precision


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    network = networks.unconditional()
    quantize_roughly_(network, Precision.parse("w4a8"), [1, 401])
    path = tmp_path_factory.mktemp("checkpoint") / "quantized.safetensors"
    save_quantized(network, path, {"settings": {"rounding": "nearest"}})
    return path


def test_inspect_says_what_a_checkpoint_holds(file, capsys):
    assert main(["inspect", str(file)]) == 0
    told = capsys.readouterr().out
    assert "UNet2DModel" in told and "rounding" in told and "time steps: 1, 401" in told
    assert "conv2d: weights 4 bits, activations 8 bits" in told


def test_export_writes_an_openvino_model(file, tmp_path, capsys):
    pytest.importorskip("openvino", reason="OpenVINO compiles what is exported: pip install tfmq-bench[deploy]")
    assert main(["export", str(file), "--to", "openvino", str(tmp_path), "--batch", "2", "--timesteps", "401"]) == 0
    assert "49 of 49 layers and products execute in integers" in capsys.readouterr().out
    found = json.loads((tmp_path / "export.json").read_text(encoding="utf-8"))
    assert (found["latents"], found["timesteps"]) == ([2, 3, 8, 8], [401])
    assert found["metadata"]["settings"] == {"rounding": "nearest"}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--to", "openvin", "x"], "did you mean 'openvino'?"),
        (["--to", "onnx", "x", "--size", "8", "8", "8"], "give a side, or height and width"),
        (["--to", "onnx", "x", "--batch", "0"], "batch is 0"),
        (["--to", "onnx", "x", "--schedule", "20", "x"], "x holds no scheduler"),
        (["--to", "onnx", "x", "--schedule", "x", "20"], "give the number of steps first"),
        (["--to", "onnx", "x", "--schedule", "20", "x", "--timesteps", "1"], "give one of them"),
    ],
)
def test_errors_are_one_line(file, options, told, capsys):
    assert main(["export", str(file), *options]) == 1
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


def test_the_time_steps_of_a_scheduler(file, tmp_path, capsys):
    pytest.importorskip("onnx", reason="onnx writes the files: pip install tfmq-bench[deploy]")
    networks.scheduler().save_pretrained(tmp_path)
    assert main(["export", str(file), "--to", "onnx", "x", "--schedule", "2", str(tmp_path)]) == 1
    assert "[1, 401], and [501] are not among them" in capsys.readouterr().err


def test_a_missing_file(tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "none")]) == 1
    assert "there is no quantised checkpoint" in capsys.readouterr().err
