"""The units of generating cells: quantising one, drawing a batch of its images, measuring its errors."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import torch

import baselines
from benchmarks.models import Model
from benchmarks.runtime import files
from benchmarks.runtime.devices import has_tf32, tf32
from benchmarks.runtime.files import ERRORS, IMAGES, QUANTIZED, TRAJECTORY
from benchmarks.runtime.images import TENSOR, batch_name
from benchmarks.runtime.workspace import MIB, MeasuredWorkspace, peak_memory, restart_peak
from benchmarks.stages import calibrate
from benchmarks.stages._setup import batches, conditioning_of, draw_noise, load_model, sampling_settings, seed_of
from benchmarks.suite import discover
from benchmarks.suite.fields import read
from benchmarks.suite.outcome import Layer, Pass, Quantized
from benchmarks.suite.record import FULL_PRECISION, Cell
from benchmarks.suite.tasks import Task
from tfmq.checkpoint import load_quantized, save_quantized
from tfmq.network.backbone import Network, backbone_of, full_precision_bytes
from tfmq.network.sampling import Step, predict_noise, sample
from tfmq.numerics.steps import exact_steps, step_value
from tfmq.packing import packed_bytes
from tfmq.passes.correction import correction_of
from tfmq.passes.temporal_cache import temporal_feature_error
from tfmq.precision import Precision
from tfmq.quantization import quantize_

PURPOSE = "sample"
# Units that draw a batch, and those that draw one in float32 whose part is in TF32.
PART, CHECK = "part", "check"


@dataclass(frozen=True)
class Work:
    """What a process needs to know of a cell to compute any unit of it."""

    task: Task
    cell: Cell
    device: str
    folder: Path
    overrides: dict[str, object]
    settings: dict[str, object]
    inputs: dict[str, str]

    @property
    def quantized(self) -> bool:
        return self.cell.method != FULL_PRECISION

    @property
    def in_tf32(self) -> bool:
        """Whether images are drawn in TF32: those of full precision, where the task says so and the device has it."""
        return self.task.tf32 and not self.quantized and has_tf32(torch.device(self.device))

    @property
    def missing(self) -> list[tuple[Work, str]]:
        """The units that can be done now: each is named by the file that it makes."""
        names = [unit_name(PART, index) for index in range(len(batches(self.task.images, self.task.batch)))]
        if self.in_tf32:
            names += [unit_name(CHECK, index) for index in range(self.task.checked_batches)]
        if self.quantized:
            names = [ERRORS, *names] if (self.folder / QUANTIZED).exists() else [QUANTIZED]
        return [(self, name) for name in names if not (self.folder / name).exists()]


def unit_name(kind: str, index: int) -> str:
    """Name of the file that a unit of a batch makes."""
    return f"{kind}-{index:05d}.safetensors"


def config_of(method: baselines.Method, cell: Cell, overrides: dict[str, object]) -> baselines.Settings:
    """The method's settings: its defaults with what params.yaml overrides. Raises ValueError for unknown settings."""
    return read(method.config, overrides, f"methods.{cell.method}")


def do(unit: tuple[Work, str]) -> None:
    """Compute one unit and write its file."""
    work, name = unit
    if name == QUANTIZED:
        _quantize(work)
    elif name == ERRORS:
        _measure_errors(work)
    else:
        _sample_batch(work, name)


def then(unit: tuple[Work, str]) -> list[tuple[Work, str]]:
    """The units that one makes possible."""
    work, name = unit
    return work.missing if name == QUANTIZED else []


def _quantize(work: Work) -> None:
    """Quantise a cell's network, resuming from units that an interrupted run or another cell has saved."""
    device = torch.device(work.device)
    forget_networks()
    restart_peak(device)
    model = load_model(work.task, device)
    method = discover.method(work.cell.method)
    recipe = baselines.recipe_under(work.cell.protocol, config_of(method, work.cell, work.overrides))
    pool = replace(calibrate.read_pool(work.task, work.cell.seed, device), scheduler=model.scheduler)
    generator = torch.Generator().manual_seed(seed_of(work.task.name, work.task.version, "quantize", work.cell.seed))
    full_bytes = full_precision_bytes(model.unet)
    precision, protocol = Precision.parse(work.cell.precision), method.protocol(work.cell.protocol)
    workspace = MeasuredWorkspace(files.LEARNED / work.task.name, partial(files.mapped, work.folder), device=device)
    report = quantize_(model.unet, precision, recipe, pool, generator, protocol, workspace)
    quantized = Quantized(
        size_mib=packed_bytes(model.unet) / MIB,
        full_precision_size_mib=full_bytes / MIB,
        peak_memory_mib=max(peak_memory(device), workspace.peak_memory_mib),
        passes=tuple(Pass(**asdict(spent)) for spent in report.passes),
        coverage=tuple(Layer(**asdict(row)) for row in report.coverage),
        details=report.details,
    )
    described = {"cell": asdict(work.cell), "settings": work.settings, "inputs": work.inputs}
    save_quantized(model.unet, work.folder / QUANTIZED, described | {"quantized": asdict(quantized)})


@lru_cache(maxsize=1)
def _model(task: Task, device: str) -> Model:
    return load_model(task, torch.device(device))


@lru_cache(maxsize=1)
def _quantized_unet(path: Path, device: str, backend: str) -> Network:
    return discover.backend(backend).network(load_quantized(path).to(device))


def forget_networks() -> None:
    """Give back the memory of what earlier units have loaded."""
    _quantized_unet.cache_clear()
    _model.cache_clear()


def _networks(work: Work) -> tuple[Model, Network]:
    """The full-precision model, and what computes the cell. Both stay loaded for the process's next unit."""
    model = _model(work.task, work.device)
    if not work.quantized:
        return model, model.unet
    return model, _quantized_unet(work.folder / QUANTIZED, work.device, work.cell.backend)


def _sample_batch(work: Work, name: str) -> None:
    """Sample and decode one batch: its images, then the file that says it is done, with what it cost.

    The first of a full-precision cell that is in float32 keeps its trajectory there, and the network's size. Where
    images are in TF32, the latents of the first batches are kept too, and a `CHECK` has latents and images in float32.
    """
    kind, number = name.removesuffix(".safetensors").split("-")
    index = int(number)
    images = batches(work.task.images, work.task.batch)[index]
    model, unet = _networks(work)
    noise, step_noise = draw_noise(work.task, PURPOSE, 0, images, model.latent_shape)
    fast = work.in_tf32 and kind == PART
    steps: list[Step] = []
    start = time.perf_counter()
    conditioning = conditioning_of(model, work.task, PURPOSE, images)
    with tf32(fast):
        latents = sample(
            unet,
            model.scheduler,
            noise.to(work.device),
            sampling_settings(work.task),
            conditioning=conditioning,
            step_noise=step_noise.to(work.device),
            callback=steps.append if index == 0 and not work.quantized and not fast else None,
        )
        decoded = model.decode(latents)
    tensors = {"seconds": torch.tensor(time.perf_counter() - start, dtype=torch.float64)}
    tensors["peak_memory_mib"] = torch.tensor(peak_memory(torch.device(work.device)), dtype=torch.float64)
    if kind == PART:
        files.write_tensors(work.folder / IMAGES / batch_name(index), {TENSOR: decoded})
    else:
        tensors[TENSOR] = decoded
    if work.in_tf32 and index < work.task.checked_batches:
        tensors["latents"] = latents.cpu()
    if steps:
        tensors["size_mib"] = torch.tensor(full_precision_bytes(unet) / MIB, dtype=torch.float64)
        tensors["trajectory.latents"] = torch.stack([step.latents for step in steps]).cpu()
        tensors["trajectory.noise"] = torch.stack([step.noise for step in steps]).cpu()
        tensors["trajectory.timesteps"] = exact_steps([step.timestep for step in steps])
    files.write_tensors(work.folder / name, tensors)


@torch.no_grad()
def _measure_errors(work: Work) -> None:
    """Errors of the predicted noise at the points of the full-precision trajectory, and of the temporal features."""
    model, unet = _networks(work)
    correction = correction_of(unet)
    path = files.cell_folder(files.full_precision_cell(work.cell)) / TRAJECTORY
    trajectory = {name: tensor.to(work.device) for name, tensor in files.read_tensors(path).items()}
    conditioning = conditioning_of(model, work.task, PURPOSE, range(trajectory["latents"].shape[1]))
    errors = []
    for latents, noise, timestep in zip(*(trajectory[k] for k in ("latents", "noise", "timesteps")), strict=True):
        predicted = predict_noise(unet, latents, timestep, conditioning, work.task.guidance_scale)
        if correction is not None:
            predicted, _ = correction(step_value(timestep), predicted, work.task.eta)
        errors.append((predicted - noise).flatten(1).norm(dim=1) / noise.flatten(1).norm(dim=1))
    temporal = temporal_feature_error(unet, model.unet, backbone_of(model.unet), trajectory["timesteps"])
    tensors = {"trajectory": torch.stack(errors, 1).cpu(), "temporal": temporal.float().cpu()}
    files.write_tensors(work.folder / ERRORS, tensors | {"timesteps": trajectory["timesteps"].cpu()})
