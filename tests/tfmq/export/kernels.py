"""Running single modules in OpenVINO, for the tests of the export."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from tfmq.export.openvino import lacks_vnni

# Kernels of such a processor run, and compute something else where sums are large.
SATURATES = lacks_vnni()
exact = pytest.mark.skipif(SATURATES, reason="sums of 8-bit products saturate on this processor, which has no VNNI")


def execute(
    module: nn.Module, inputs: Sequence[Tensor], example: Sequence[Tensor] | None = None, **settings: object
) -> tuple[list[Tensor], list[str]]:
    """A module's outputs from OpenVINO, and the kernels of its convolutions and matrix products.

    It is traced with ``example``, or with the inputs.
    """
    import openvino

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = openvino.convert_model(module.eval(), example_input=tuple(example or inputs))
    model.reshape({port: list(x.shape) for port, x in zip(model.inputs, inputs, strict=True)})
    plain = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.Core().compile_model(model, "CPU", plain | settings)
    outputs = compiled([x.numpy() for x in inputs])
    told = [node.get_rt_info() for node in compiled.get_runtime_model().get_ordered_ops()]
    matrix = ("Convolution", "FullyConnected", "MatMul")
    kernels = [info["primitiveType"].value for info in told if info["layerType"].value in matrix]
    return [torch.from_numpy(outputs[port].copy()) for port in compiled.outputs], kernels


def is_integer(kernel: str) -> bool:
    return kernel.lower().endswith("i8")


def difference(found: Tensor, expected: Tensor) -> float:
    """Relative, in the Euclidean norm."""
    return float((found - expected).norm() / expected.norm())
