"""A quantised network as an ONNX file with QuantizeLinear and DequantizeLinear, for other programs to take.

Good for interchange: codes, scales and zero points stand in the file as ONNX defines them, per channel for weights, and
any ONNX program computes the simulation. Not made for speed: ONNX Runtime keeps convolutions in floating point unless
their outputs are quantised too (71 ms, where full precision takes 61, on a small UNet). On a CPU,
`tfmq.export.openvino` is what executes in integers. Weights of fewer than 8 bits take a byte each.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping, Sequence
from importlib import metadata as packages
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tfmq.export.checks import check_executable, chosen_timesteps
from tfmq.export.description import Description, InputShape, plain_config, writable
from tfmq.export.kernels import expected_kernels
from tfmq.export.network import ExecutableNetwork
from tfmq.network.backbone import Network, backbone_of

if TYPE_CHECKING:
    import onnx

MODEL, OPSET = "model.onnx", 17
MISSING = "onnx is not installed: pip install tfmq-bench[deploy]"


@torch.no_grad()
def export_onnx(
    network: Network,
    folder: str | Path,
    shape: InputShape,
    timesteps: Tensor | Sequence[int] | None = None,
    metadata: Mapping[str, object] | None = None,
) -> None:
    """Write a quantised network as `model.onnx`, with its weights in `model.onnx.data`, and `export.json`.

    Inputs are ``latents`` (B, C, H, W), ``step`` (1,), the index of a time step in the ``timesteps`` of `export.json`,
    and ``condition`` where there is one; the output is ``noise``. Arguments and errors are those of
    `tfmq.export.openvino.export_openvino`. A noise correction (PTQD) is not in the file.
    """
    try:
        import onnx
    except ImportError:
        raise ValueError(MISSING) from None
    backbone = backbone_of(network)
    check_executable(network, backbone)
    steps = chosen_timesteps(network, timesteps)
    folder = writable(folder)
    made = Path(mkdtemp(prefix=".export-", dir=folder))
    try:
        twin = ExecutableNetwork(network, steps).eval()
        latents, condition = shape.latents(network), shape.condition(network, twin.condition)
        inputs = [torch.zeros(latents), torch.zeros(1, dtype=torch.int64)]
        if condition is not None:
            inputs.append(torch.zeros(condition, dtype=torch.int64 if len(condition) == 1 else torch.float32))
        traced = made / "traced.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                twin,
                tuple(inputs),
                str(traced),
                dynamo=False,
                opset_version=OPSET,
                do_constant_folding=False,
                input_names=list(twin.ports),
                output_names=["noise"],
            )
        model = onnx.load(traced)
        for path in made.iterdir():
            path.unlink()
        _dequantize_weights(model)
        onnx.save(model, made / MODEL, save_as_external_data=True, location=f"{MODEL}.data")
        described = Description(
            target="onnx",
            network_class=type(network).__name__,
            config=plain_config(network),
            latents=latents,
            condition=condition,
            timesteps=tuple(steps.tolist()),
            kernels=tuple(expected_kernels(network, backbone)),
            versions={name: packages.version(name) for name in ("onnx", "torch", "diffusers")},
            metadata=metadata or {},
        )
        described.write(made)
        for path in made.iterdir():
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _dequantize_weights(model: onnx.ModelProto) -> None:
    """Write a weight's conversion to float and its scales as one DequantizeLinear with a scale per output channel."""
    from onnx import helper, numpy_helper

    graph = model.graph
    # The exporter keeps equal tensors once, and lets the others be the identity of that one.
    same = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Identity"}
    nodes = [node for node in graph.node if node.op_type != "Identity"]
    for node in nodes:
        node.input[:] = [same.get(name, name) for name in node.input]
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    codes = {
        node.output[0]: node.input[0]
        for node in nodes
        if node.op_type == "Cast" and node.input[0] in tensors and node.input[0].endswith(".weight.codes")
    }
    scales, kept = {}, []
    for node in nodes:
        weight = next((codes[name] for name in node.input if name in codes), None)
        if weight is not None:
            (scale,) = (name for name in node.input if name not in codes)
            scales[scale] = numpy_helper.from_array(numpy_helper.to_array(tensors[scale]).reshape(-1), scale)
            node = helper.make_node("DequantizeLinear", [weight, scale], list(node.output), node.name, axis=0)
        if node.output[0] not in codes:
            kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)
    for name, scale in scales.items():
        tensors[name].CopyFrom(scale)
