"""ONNX files: other programs read codes, scales and zero points, and compute the simulation."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch

from tests.tfmq import networks
from tests.tfmq.export.executed import SHAPE, quantized
from tests.tfmq.export.kernels import difference
from tfmq.export.onnx import export_onnx
from tfmq.network.backbone import backbone_of, evaluate
from tfmq.plan import quantized_layers

onnx = pytest.importorskip("onnx", reason="onnx writes the files: pip install tfmq-bench[deploy]")
runtime = pytest.importorskip("onnxruntime", reason="ONNX Runtime reads the files: pip install tfmq-bench[deploy]")


@pytest.mark.parametrize(
    ("method", "precision", "protocol", "kind"),
    [
        ("tfmq", "w8a8", "deployable", "unconditional"),
        ("tfmq", "w4a8", "shared", "text"),
        ("tfmq", "w8a8", "deployable", "transformer"),
        ("tfmq_per_step", "w8a8", "shared", "unconditional"),
    ],
)
def test_another_program_computes_the_simulation(method, precision, protocol, kind, tmp_path):
    network, full, pool = quantized(method, precision, protocol, kind)
    export_onnx(network, tmp_path, SHAPE, pool.timesteps, {"method": method})
    onnx.checker.check_model(str(tmp_path / "model.onnx"))
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    temporal = set(backbone_of(full).temporal)
    layers = {path: layer for path, layer in quantized_layers(network).items() if path not in temporal}
    per_channel = [
        node for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0].endswith(".weight.codes")
    ]
    assert len(per_channel) == len(layers) and all(a.i == 0 for node in per_channel for a in node.attribute)
    counts = Counter(node.op_type for node in graph.node)
    assert counts["QuantizeLinear"] >= len(layers)
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = runtime.InferenceSession(tmp_path / "model.onnx", options)
    described = json.loads((tmp_path / "export.json").read_text(encoding="utf-8"))
    assert (described["target"], described["metadata"]) == ("onnx", {"method": method})
    x = networks.noise(4)
    condition = backbone_of(full).random_condition(full, 4, SHAPE.tokens, full.device, networks.generator())
    errors, cost = [], []
    for index, step in enumerate(described["timesteps"]):
        inputs = {"latents": x.numpy(), "step": torch.tensor([index]).numpy()}
        inputs |= {} if condition is None else {"condition": condition.numpy()}
        (noise,) = session.run(["noise"], inputs)
        with torch.no_grad():
            simulated, exact = (evaluate(each, x, torch.tensor(step), condition) for each in (network, full))
        errors.append(difference(torch.from_numpy(noise)[:, :3], simulated))
        cost.append(difference(simulated, exact))
    assert sum(errors) < sum(cost) / 2
