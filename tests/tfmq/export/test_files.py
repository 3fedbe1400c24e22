"""What the files of an export hold."""

from __future__ import annotations

import json

import pytest
import torch

from tests.tfmq import networks
from tests.tfmq.export.executed import SHAPE, quantized
from tfmq.checkpoint import load_quantized, save_quantized
from tfmq.export.description import Description, InputShape
from tfmq.export.openvino import export_openvino
from tfmq.export.roughly import quantize_roughly_
from tfmq.export.runner import ExportedNetwork
from tfmq.precision import Precision

pytest.importorskip("openvino", reason="OpenVINO reads the files: pip install tfmq-bench[deploy]")


def test_the_description_says_what_it_is(tmp_path):
    network, _, pool = quantized("tfmq", "w8a8", "deployable")
    save_quantized(network, tmp_path / "quantized.safetensors", {"method": "tfmq"})
    export_openvino(load_quantized(tmp_path / "quantized.safetensors"), tmp_path, SHAPE, None, {"method": "tfmq"})
    found = json.loads((tmp_path / "export.json").read_text(encoding="utf-8"))
    assert (found["network_class"], found["latents"], found["condition"]) == ("UNet2DModel", [4, 3, 8, 8], None)
    assert found["timesteps"] == pool.timesteps.unique().tolist() and found["metadata"] == {"method": "tfmq"}
    assert Description.read(tmp_path).kernels == tuple(ExportedNetwork(tmp_path, threads=1).kernels)


def test_an_export_replaces_the_one_before_and_leaves_the_network_as_it_is(tmp_path):
    network, x = networks.unconditional(), networks.noise(2)
    quantize_roughly_(network, Precision.parse("w8a8"), [1, 401])
    with torch.no_grad():
        before = network(x, 1).sample
        for height in (8, 16):
            export_openvino(network, tmp_path, InputShape(2, height, 8))
        assert torch.equal(network(x, 1).sample, before)
    assert ExportedNetwork(tmp_path)(torch.zeros(2, 3, 16, 8), 1).sample.shape == (2, 3, 16, 8)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["export.json", "openvino_model.bin", "openvino_model.xml"]
