"""The engines: torch and OpenVINO in full precision and with integers, and NNCF's quantisation as the peer."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.latency import Engine, Evaluate, Workload
from tfmq.checkpoint import NETWORKS, load_quantized, save_quantized
from tfmq.network.backbone import Network, evaluate
from tfmq.network.rows import CalibrationRows

if TYPE_CHECKING:
    import openvino

MODEL, CLASS = "model.xml", "class.json"
FULL = "w32a32"
# Evaluations whose activations NNCF looks at.
NNCF_SAMPLES = 32


def engines(precisions: list[str]) -> list[Engine]:
    """All engines: full precision, the peer, and this library's networks at each precision."""
    ours = [kind(precision) for precision in precisions for kind in (OpenVINOIntegers, TorchIntegers)]
    return [Torch(), OpenVINO(), NNCF(), *ours]


@dataclass(frozen=True)
class Torch(Engine):
    """PyTorch in float32."""

    precision: str = FULL
    label = "PyTorch, float32"

    def make(self, workload: Workload, folder: Path) -> None:
        """See `Engine`."""
        workload.full.save_pretrained(folder)
        (folder / CLASS).write_text(json.dumps(type(workload.full).__name__), encoding="utf-8")

    def load(self, folder: Path, threads: int) -> Evaluate:
        """See `Engine`."""
        torch.set_num_threads(threads)
        kind = NETWORKS[json.loads((folder / CLASS).read_text(encoding="utf-8"))]
        return _of_torch(kind.from_pretrained(folder).eval())


@dataclass(frozen=True)
class TorchIntegers(Engine):
    """PyTorch with the integer products of `tfmq.executing`."""

    precision: str
    label = "PyTorch, integers"

    @property
    def objection(self) -> str:
        """See `Engine`."""
        from tfmq.execution import check_processor

        try:
            check_processor(torch.device("cpu"))
        except ValueError as error:
            return str(error)
        return ""

    def make(self, workload: Workload, folder: Path) -> None:
        """See `Engine`."""
        save_quantized(workload.quantized[self.precision], folder / "quantized.safetensors", {})

    def load(self, folder: Path, threads: int) -> Evaluate:
        """See `Engine`."""
        from tfmq.execution import executing

        torch.set_num_threads(threads)
        return _of_torch(executing(load_quantized(folder / "quantized.safetensors")))


class _Plain(nn.Module):
    """A network in full precision with the inputs in their order."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, latents: Tensor, timestep: Tensor, condition: Tensor | None = None) -> Tensor:
        """(B, C, H, W)."""
        return evaluate(self.network, latents, timestep, condition)


@dataclass(frozen=True)
class OpenVINO(Engine):
    """OpenVINO in float32."""

    precision: str = FULL
    label = "OpenVINO, float32"

    @torch.no_grad()
    def make(self, workload: Workload, folder: Path) -> None:
        """See `Engine`."""
        import openvino

        openvino.save_model(_converted(workload), folder / MODEL, compress_to_fp16=False)

    def load(self, folder: Path, threads: int) -> Evaluate:
        """See `Engine`."""
        import openvino

        core = openvino.Core()
        settings = {
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
        }
        request = core.compile_model(core.read_model(folder / MODEL), "CPU", settings).create_infer_request()

        def run(latents: Tensor, timestep: Tensor, condition: Tensor | None) -> Tensor:
            return torch.from_numpy(request.infer(_arrays(latents, timestep, condition))[0].copy())

        return run


@dataclass(frozen=True)
class NNCF(OpenVINO):
    """OpenVINO's own post-training quantisation (NNCF) with its settings for transformers; 8 bits."""

    precision: str = "w8a8"
    label = "OpenVINO, NNCF's own quantisation"

    @torch.no_grad()
    def make(self, workload: Workload, folder: Path) -> None:
        """See `Engine`."""
        import nncf
        import openvino

        count = min(NNCF_SAMPLES, len(workload.rows) // workload.batch)
        rows = [_of_one_step(workload, index) for index in range(count)]
        samples = [_arrays(each.latents, each.timesteps[:1], each.context) for each in rows]
        quantized = nncf.quantize(
            _converted(workload),
            nncf.Dataset(samples),
            subset_size=len(samples),
            model_type=nncf.ModelType.TRANSFORMER,
        )
        openvino.save_model(quantized, folder / MODEL, compress_to_fp16=False)


@dataclass(frozen=True)
class OpenVINOIntegers(Engine):
    """OpenVINO with the integer kernels of `tfmq.export`."""

    precision: str
    label = "OpenVINO, integers"

    def make(self, workload: Workload, folder: Path) -> None:
        """See `Engine`."""
        from tfmq.export.description import InputShape
        from tfmq.export.openvino import export_openvino

        latents, context = workload.rows.latents, workload.rows.context
        tokens = context.shape[1] if context is not None and context.dim() == 3 else 1
        shape = InputShape(workload.batch, latents.shape[2], latents.shape[3], tokens)
        export_openvino(workload.quantized[self.precision], folder, shape, workload.timesteps)

    def load(self, folder: Path, threads: int) -> Evaluate:
        """See `Engine`."""
        from tfmq.export.runner import ExportedNetwork

        network = ExportedNetwork(folder, threads)

        def run(latents: Tensor, timestep: Tensor, condition: Tensor | None) -> Tensor:
            return network(latents, timestep, condition, return_dict=False)[0]

        return run


def _of_torch(network: Network) -> Evaluate:
    @torch.no_grad()
    def run(latents: Tensor, timestep: Tensor, condition: Tensor | None) -> Tensor:
        return evaluate(network, latents, timestep, condition)

    return run


def _of_one_step(workload: Workload, index: int) -> CalibrationRows:
    """One evaluation's rows, all of one time step, that differ from those of other indices."""
    step = workload.timesteps[index % len(workload.timesteps)]
    rows = workload.rows[(workload.rows.timesteps == step).nonzero().flatten()]
    first = index // len(workload.timesteps) * workload.batch % max(1, len(rows) - workload.batch + 1)
    return rows[slice(first, first + workload.batch)]


def _converted(workload: Workload) -> openvino.Model:
    """The full-precision network as an OpenVINO model of fixed shapes."""
    import openvino

    rows = _of_one_step(workload, 0)
    example = (rows.latents, rows.timesteps[:1], *(() if rows.context is None else (rows.context,)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(_Plain(workload.full).eval(), example, check_trace=False)
        model = openvino.convert_model(traced, example_input=example)
    shapes = [openvino.PartialShape(list(part.shape)) for part in example]
    model.reshape(dict(zip(model.inputs, shapes, strict=True)))
    return model


def _arrays(latents: Tensor, timestep: Tensor, condition: Tensor | None) -> list[np.ndarray]:
    parts = [latents, timestep.reshape(1), *(() if condition is None else (condition,))]
    return [part.contiguous().numpy() for part in parts]
