"""generate: quantise the model of a cell and sample its images; the full-precision cell only samples.

Work is kept in `.resume/` while it goes on, under a name that holds the hash of settings, inputs and code: first the
quantised checkpoint, then the images of each generation batch. A run that is killed goes on from there. Sampling is cut
at batch boundaries and takes one thread a process on a CPU, so that one process or many give the same bytes.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import diffusers
import torch
from tqdm import tqdm

import baselines
import tfmq
from benchmarks import discover, environment, manifest, models
from benchmarks.fields import read
from benchmarks.models import Model
from benchmarks.params import Suite, Task
from benchmarks.record import FULL_PRECISION, Cell
from benchmarks.stages import calibrate, files, setup
from benchmarks.stages.setup import (
    batches,
    conditioning_of,
    device_of,
    draw_noise,
    load_model,
    sampling_settings,
    seed_of,
    task_of,
)
from tfmq.checkpoint import full_precision_bytes, load_quantized, packed_bytes, read_metadata, save_quantized
from tfmq.precision import Precision
from tfmq.sampling import Step, predict_noise, sample
from tfmq.temporal import temporal_feature_error
from tfmq.unet import UNet, UNetLayout

IMAGES = "images.safetensors"
ERRORS = "errors.safetensors"
TRAJECTORY = "trajectory.safetensors"
QUANTIZED = "quantized.safetensors"
OUTCOME = "outcome.json"
MIB = 2**20


@dataclass(frozen=True)
class Work:
    """One cell's sampling, as every process that shares it needs to know it."""

    task: Task
    cell: Cell
    device: str
    folder: Path

    @property
    def quantized(self) -> bool:
        return self.cell.method != FULL_PRECISION


def run(suite: Suite, cell: Cell, device_name: str, shards: int) -> None:
    """Write the folder of a cell: images, errors against full precision, checkpoint and outcome.

    ``shards`` processes share the sampling. Raises ValueError for unknown names and for damaged inputs.
    """
    task = task_of(suite, cell.task)
    device = device_of(device_name)
    if cell.method == FULL_PRECISION:
        if cell != files.full_precision_cell(cell):
            raise ValueError(f"{FULL_PRECISION} is w32a32, not {cell.precision}: leave the precision out")
        settings, inputs = {}, {"checkpoint": manifest.verify(Path(task.checkpoint))}
    else:
        method, config = resolve(suite, cell)
        objection = method.objection(Precision.parse(cell.precision))
        if objection:
            with files.new_folder(files.cell_folder(cell)) as folder:
                files.write_json(folder / OUTCOME, {"status": "not applicable", "reason": objection})
            return
        pool = files.calibration(task.name) / calibrate.POOL
        trajectory = files.cell_folder(files.full_precision_cell(cell)) / TRAJECTORY
        settings = asdict(config)
        inputs = {
            "checkpoint": manifest.verify(Path(task.checkpoint)),
            "calibration": files.sha256(pool),
            "trajectory": files.sha256(trajectory),
        }
    key = files.fingerprint(asdict(task), asdict(cell), settings, suite.threads, inputs, str(device), _code())
    work = Work(task, cell, str(device), files.RESUME / f"{cell.name}-{key}")
    for superseded in files.RESUME.glob(f"{cell.name}-{'[0-9a-f]' * len(key)}"):
        if superseded != work.folder:
            shutil.rmtree(superseded)
    work.folder.mkdir(parents=True, exist_ok=True)
    if work.quantized and not (work.folder / QUANTIZED).exists():
        torch.set_num_threads(suite.threads)
        _quantize(suite, work, inputs, settings)
    _share(work, shards)
    _finish(work, settings, inputs)


def _code() -> list[str]:
    """What besides settings and inputs decides a cell's bytes: source files and the versions of what they call."""
    folders = [Path(package.__file__).parent for package in (tfmq, baselines, models)]
    sources = files.source_hash(*folders, Path(calibrate.__file__), Path(setup.__file__), Path(__file__))
    return [sources, torch.__version__, diffusers.__version__]


def resolve(suite: Suite, cell: Cell) -> tuple[baselines.Method, object]:
    """The method of a cell and its settings: the method's defaults with what params.yaml overrides.

    Raises ValueError for names the suite does not have, and for unknown settings, with the nearest name.
    """
    if cell.method not in suite.methods:
        raise discover.unknown("method", cell.method, [*suite.methods, FULL_PRECISION], "Methods stand in params.yaml.")
    if cell.precision not in suite.precisions:
        raise discover.unknown("precision", cell.precision, suite.precisions, "Precisions stand in params.yaml.")
    method = discover.method(cell.method)
    return method, read(method.config, suite.methods[cell.method], f"methods.{cell.method}")


def _quantize(suite: Suite, work: Work, inputs: dict[str, str], settings: dict) -> None:
    device = torch.device(work.device)
    model = load_model(work.task, device)
    method, config = resolve(suite, work.cell)
    pool = calibrate.read_pool(work.task.name, device)
    generator = torch.Generator().manual_seed(seed_of(work.task.name, work.task.version, "quantize", work.cell.seed))
    full_bytes = full_precision_bytes(model.unet)
    report = method.quantize(model.unet, pool, Precision.parse(work.cell.precision), config, generator)
    metadata = {
        "cell": asdict(work.cell),
        "settings": settings,
        "inputs": inputs,
        "seconds": report.seconds,
        "effort": asdict(report.effort),
        "coverage": [asdict(row) for row in report.coverage],
        "size_mib": packed_bytes(model.unet) / MIB,
        "full_precision_size_mib": full_bytes / MIB,
        "peak_memory_mib": _peak_memory(device),
    }
    save_quantized(model.unet, work.folder / QUANTIZED, metadata)


def _peak_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB


def _share(work: Work, shards: int) -> None:
    """Do what is missing of a cell's sampling in ``shards`` processes."""
    units = [index for index in range(_units(work)) if not _part(work, index).exists()]
    if not units:
        return
    shards = min(shards, len(units))
    if shards == 1:
        _do(work, units)
        return
    # Spawned, not forked: a forked process inherits OpenMP's locks in whatever state they are.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(shards, context) as executor:
        for done in [executor.submit(_do, work, units[shard::shards], shard) for shard in range(shards)]:
            done.result()


def _units(work: Work) -> int:
    """Generation batches, and for a quantised cell one unit more: its errors along the full-precision trajectory."""
    return len(batches(work.task.images, work.task.batch)) + work.quantized


def _part(work: Work, index: int) -> Path:
    return work.folder / f"part-{index:05d}.safetensors"


def _do(work: Work, units: Sequence[int], shard: int = 0) -> None:
    """Compute some units of a cell, each written when done."""
    torch.set_num_threads(1)
    model = load_model(work.task, device_of(work.device))
    unet = load_quantized(work.folder / QUANTIZED).to(work.device) if work.quantized else model.unet
    cuts = batches(work.task.images, work.task.batch)
    for index in tqdm(units, desc=f"{work.cell.name} shard {shard}", disable=None, position=shard):
        if index < len(cuts):
            _sample_batch(work, model, unet, index, cuts[index])
        else:
            _measure_errors(work, model, unet, index)


def _sample_batch(work: Work, model: Model, unet: UNet, index: int, images: range) -> None:
    """Sample and decode one batch; the first of a full-precision cell keeps its trajectory."""
    noise, step_noise = draw_noise(work.task, "sample", work.cell.seed, images, model.latent_shape)
    steps: list[Step] = []
    start = time.perf_counter()
    latents = sample(
        unet,
        model.scheduler,
        noise.to(work.device),
        sampling_settings(work.task),
        conditioning=conditioning_of(model, images),
        step_noise=step_noise.to(work.device),
        callback=steps.append if index == 0 and not work.quantized else None,
    )
    tensors = {"images": model.decode(latents)}
    tensors["seconds"] = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    tensors["peak_memory_mib"] = torch.tensor(_peak_memory(torch.device(work.device)), dtype=torch.float64)
    if steps:
        tensors["trajectory.latents"] = torch.stack([step.latents for step in steps]).cpu()
        tensors["trajectory.noise"] = torch.stack([step.noise for step in steps]).cpu()
        tensors["trajectory.timesteps"] = torch.tensor([step.timestep for step in steps])
    files.write_tensors(_part(work, index), tensors)


@torch.no_grad()
def _measure_errors(work: Work, model: Model, unet: UNet, index: int) -> None:
    """Errors of the predicted noise at the points of the full-precision trajectory, and of the temporal features."""
    path = files.cell_folder(files.full_precision_cell(work.cell)) / TRAJECTORY
    trajectory = {name: tensor.to(work.device) for name, tensor in files.read_tensors(path).items()}
    conditioning = conditioning_of(model, range(trajectory["latents"].shape[1]))
    errors = []
    for latents, noise, timestep in zip(*(trajectory[k] for k in ("latents", "noise", "timesteps")), strict=True):
        predicted = predict_noise(unet, latents, timestep, conditioning, work.task.guidance_scale)
        errors.append((predicted - noise).flatten(1).norm(dim=1) / noise.flatten(1).norm(dim=1))
    temporal = temporal_feature_error(unet, model.unet, UNetLayout.of(model.unet), trajectory["timesteps"])
    tensors = {"trajectory": torch.stack(errors, 1).cpu(), "temporal": temporal.float().cpu()}
    files.write_tensors(_part(work, index), tensors | {"timesteps": trajectory["timesteps"].cpu()})


def _finish(work: Work, settings: dict, inputs: dict[str, str]) -> None:
    """Put the parts together under the cell's final name, then forget them."""
    cuts = batches(work.task.images, work.task.batch)
    parts = [files.read_tensors(_part(work, index)) for index in range(len(cuts))]
    outcome = {
        "status": "measured",
        "reason": "",
        "settings": settings,
        "inputs": inputs,
        "device": _device_name(torch.device(work.device)),
        "environment": environment.describe(work.device),
        "sample_seconds": sum(part["seconds"].item() for part in parts),
    }
    with files.new_folder(files.cell_folder(work.cell)) as folder:
        files.write_tensors(folder / IMAGES, {"images": torch.cat([part["images"] for part in parts])})
        if work.quantized:
            shutil.copy(work.folder / QUANTIZED, folder / QUANTIZED)
            shutil.copy(_part(work, len(cuts)), folder / ERRORS)
            outcome |= read_metadata(work.folder / QUANTIZED)
        else:
            names = ("latents", "noise", "timesteps")
            files.write_tensors(folder / TRAJECTORY, {name: parts[0][f"trajectory.{name}"] for name in names})
            model = load_model(work.task, torch.device("cpu"))
            size = full_precision_bytes(model.unet) / MIB
            outcome |= {
                "size_mib": size,
                "full_precision_size_mib": size,
                "peak_memory_mib": max(part["peak_memory_mib"].item() for part in parts),
            }
        files.write_json(folder / OUTCOME, outcome)
    shutil.rmtree(work.folder)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def default_shards(device_name: str) -> int:
    """Processes that share sampling unless told otherwise: one a CPU core, or one on a GPU."""
    if device_of(device_name).type == "cuda":
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
