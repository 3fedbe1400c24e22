"""generate: quantise the models of a row's cells and sample their images; the full-precision cell only samples.

The work is a queue of units, for one process or many: quantising a cell, then its generation batches and its errors. A
unit takes one thread on a CPU and depends on no other but the cell's quantised checkpoint, so any number of processes
gives the same bytes. What is finished is kept in `.resume/`, under a name that holds the hash of settings, inputs and
code, until all cells are: a run that is killed, or of which a cell fails, goes on from there. What a quantisation
learns is kept in `work/learned/`, unit by unit, for every cell that begins alike.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from itertools import takewhile
from pathlib import Path

import diffusers
import torch

import baselines
from benchmarks.models import Model
from benchmarks.runtime import environment, files, manifest
from benchmarks.runtime.devices import device_of
from benchmarks.runtime.files import ERRORS, IMAGES, OUTCOME, QUANTIZED, TRAJECTORY
from benchmarks.runtime.images import TENSOR, batch_name
from benchmarks.runtime.workers import run_units
from benchmarks.runtime.workspace import MIB, MeasuredWorkspace, peak_memory, restart_peak
from benchmarks.stages import calibrate
from benchmarks.stages._setup import (
    batches,
    conditioning_of,
    draw_noise,
    load_model,
    prompt_file,
    sampling_settings,
    seed_of,
    task_of,
)
from benchmarks.suite import discover
from benchmarks.suite.fields import read
from benchmarks.suite.outcome import Layer, Made, Outcome, Pass, Quantized
from benchmarks.suite.params import Suite, Task
from benchmarks.suite.record import FULL_PRECISION, Cell
from tfmq.checkpoint import load_quantized, packed_bytes, read_metadata, save_quantized
from tfmq.closure import code_hash
from tfmq.network.backbone import Network, backbone_of, full_precision_bytes
from tfmq.network.sampling import Step, predict_noise, sample
from tfmq.passes.correction import correction_of
from tfmq.passes.temporal_cache import temporal_feature_error
from tfmq.precision import Precision
from tfmq.quantization import quantize_

PURPOSE = "sample"


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
    def missing(self) -> list[tuple[Work, str]]:
        """The units that can be done now: each is named by the file that it makes."""
        names = [f"part-{index:05d}.safetensors" for index in range(len(batches(self.task.images, self.task.batch)))]
        if self.quantized:
            names = [ERRORS, *names] if (self.folder / QUANTIZED).exists() else [QUANTIZED]
        return [(self, name) for name in names if not (self.folder / name).exists()]


def run(suite: Suite, cells: Sequence[Cell], device_name: str, shards: int) -> None:
    """Write the folders of some cells: images, errors against full precision, checkpoint and outcome.

    ``shards`` processes share the work. Raises ValueError for unknown names and for damaged inputs, and, after the
    other cells are finished, an ExceptionGroup of what stopped the failing ones.
    """
    device = device_of(device_name)
    torch.set_num_threads(1)
    works = [work for cell in cells if (work := _prepare(suite, cell, device)) is not None]
    with ExitStack() as held:
        for work in works:
            held.enter_context(files.exclusive(work.folder, work.cell.name))
            _remove_superseded(work)
        _make(works, device, shards)


def _make(works: Sequence[Work], device: torch.device, shards: int) -> None:
    """Do all units of some cells and put these together."""
    units = (unit for work in _shared_last(works) for unit in work.missing)
    failures = run_units(units, _do, shards, device, then=_then)
    _forget_networks()
    failed = {work.cell: error for (work, _), error in reversed(failures)}
    for work in works:
        if work.cell not in failed:
            _finish(work)
    for cell, error in failed.items():
        error.add_note(cell.name)
    if failed:
        raise ExceptionGroup(f"{len(failed)} of {len(works)} cells failed", list(failed.values()))
    for work in works:
        shutil.rmtree(work.folder)


def _shared_last(works: Sequence[Work]) -> list[Work]:
    """The cells in an order in which those whose quantisation begins like another one's find it learned already."""
    seen: Counter[object] = Counter()
    order = []
    for work in works:
        beginning = _beginning(work) if work.quantized else work.cell
        order.append((seen[beginning], work))
        seen[beginning] += 1
    return [work for _, work in sorted(order, key=lambda entry: entry[0])]


def _beginning(work: Work) -> tuple[object, ...]:
    """What decides the part of a quantisation that comes before activations."""
    cell, precision = work.cell, Precision.parse(work.cell.precision)
    recipe = _config(discover.method(cell.method), cell, work.overrides).recipe()
    shared = tuple(takewhile(lambda step: not step.sees_activations, recipe))
    return work.task.name, cell.protocol, cell.seed, precision.weight_bits, precision.quantizes_activations, shared


def _remove_superseded(work: Work) -> None:
    """Remove unfinished work on the same cell with other code, settings or inputs."""
    name, _, key = work.folder.name.rpartition("-")
    for folder in work.folder.parent.glob(f"{name}-{'[0-9a-f]' * len(key)}"):
        if folder != work.folder:
            shutil.rmtree(folder)


def _prepare(suite: Suite, cell: Cell, device: torch.device) -> Work | None:
    """The work of a cell, with its folder in `.resume/`; None where the method objects, which is then the outcome."""
    task = task_of(suite, cell.task)
    overrides, settings, inputs = suite.settings(cell.task, cell.method), {}, {}
    if cell.method != FULL_PRECISION:
        method = discover.method(cell.method)
        settings = asdict(_config(method, cell, overrides))
        objection = _objection(method, cell)
        if objection:
            with files.new_folder(files.cell_folder(cell)) as folder:
                files.write_json(folder / OUTCOME, Outcome("not applicable", objection).to_json())
            return None
        inputs["calibration"] = files.sha256(files.calibration(task.name) / files.pool(cell.seed))
        inputs["trajectory"] = files.sha256(files.cell_folder(files.full_precision_cell(cell)) / TRAJECTORY)
    inputs["checkpoint"] = manifest.verify(Path(task.checkpoint))
    if task.prompts is not None:
        inputs["prompts"] = files.sha256(prompt_file(task, PURPOSE))
    key = files.fingerprint(asdict(task), asdict(cell), settings, inputs, str(device), _code(task, cell))
    resume = files.RESUME / cell.name
    return Work(task, cell, str(device), resume.with_name(f"{resume.name}-{key}"), overrides, settings, inputs)


def _config(method: baselines.Method, cell: Cell, overrides: dict[str, object]) -> baselines.Settings:
    """The method's settings: its defaults with what params.yaml overrides. Raises ValueError for unknown settings."""
    return read(method.config, overrides, f"methods.{cell.method}")


def _objection(method: baselines.Method, cell: Cell) -> str:
    if method.protocol(cell.protocol) is None:
        return "no choice of layers of its own is known"
    return method.objection(Precision.parse(cell.precision))


def _code(task: Task, cell: Cell) -> list[str]:
    """What besides settings and inputs decides a cell's bytes: its code, and the versions of what that calls."""
    entries = [Path(__file__), discover.file(discover.FAMILIES, task.family)]
    if cell.method != FULL_PRECISION:
        entries.append(discover.file(discover.METHODS, cell.method))
    return [code_hash(*entries), torch.__version__, diffusers.__version__]


def _do(unit: tuple[Work, str]) -> None:
    """Compute one unit and write its file."""
    work, name = unit
    if name == QUANTIZED:
        _quantize(work)
    elif name == ERRORS:
        _measure_errors(work)
    else:
        _sample_batch(work, name)


def _then(unit: tuple[Work, str]) -> list[tuple[Work, str]]:
    work, name = unit
    return work.missing if name == QUANTIZED else []


def _quantize(work: Work) -> None:
    """Quantise a cell's UNet, or go on where a killed run was, or where a cell that begins alike has been."""
    device = torch.device(work.device)
    _forget_networks()
    restart_peak(device)
    model = load_model(work.task, device)
    method = discover.method(work.cell.method)
    recipe = _config(method, work.cell, work.overrides).recipe()
    pool = calibrate.read_pool(work.task, work.cell.seed, device)
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
def _quantized_unet(path: Path, device: str) -> Network:
    return load_quantized(path).to(device)


def _forget_networks() -> None:
    """Give back the memory of what earlier units have loaded."""
    _quantized_unet.cache_clear()
    _model.cache_clear()


def _networks(work: Work) -> tuple[Model, Network]:
    """The full-precision model, and the UNet of the cell. Both stay loaded for the process's next unit."""
    model = _model(work.task, work.device)
    return model, _quantized_unet(work.folder / QUANTIZED, work.device) if work.quantized else model.unet


def _sample_batch(work: Work, name: str) -> None:
    """Sample and decode one batch: its images, then the file that says it is done, with what it cost.

    The first of a full-precision cell keeps its trajectory there, and the network's size.
    """
    index = int(name[len("part-") :].split(".")[0])
    images = batches(work.task.images, work.task.batch)[index]
    model, unet = _networks(work)
    noise, step_noise = draw_noise(work.task, PURPOSE, 0, images, model.latent_shape)
    steps: list[Step] = []
    start = time.perf_counter()
    latents = sample(
        unet,
        model.scheduler,
        noise.to(work.device),
        sampling_settings(work.task),
        conditioning=conditioning_of(model, work.task, PURPOSE, images),
        step_noise=step_noise.to(work.device),
        callback=steps.append if index == 0 and not work.quantized else None,
        correction=correction_of(unet),
    )
    decoded = model.decode(latents)
    tensors = {"seconds": torch.tensor(time.perf_counter() - start, dtype=torch.float64)}
    tensors["peak_memory_mib"] = torch.tensor(peak_memory(torch.device(work.device)), dtype=torch.float64)
    files.write_tensors(work.folder / IMAGES / batch_name(index), {TENSOR: decoded})
    if steps:
        tensors["size_mib"] = torch.tensor(full_precision_bytes(unet) / MIB, dtype=torch.float64)
        tensors["trajectory.latents"] = torch.stack([step.latents for step in steps]).cpu()
        tensors["trajectory.noise"] = torch.stack([step.noise for step in steps]).cpu()
        tensors["trajectory.timesteps"] = torch.tensor([step.timestep for step in steps])
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
            predicted, _ = correction(int(timestep), predicted, work.task.eta)
        errors.append((predicted - noise).flatten(1).norm(dim=1) / noise.flatten(1).norm(dim=1))
    temporal = temporal_feature_error(unet, model.unet, backbone_of(model.unet), trajectory["timesteps"])
    tensors = {"trajectory": torch.stack(errors, 1).cpu(), "temporal": temporal.float().cpu()}
    files.write_tensors(work.folder / ERRORS, tensors | {"timesteps": trajectory["timesteps"].cpu()})


def _finish(work: Work) -> None:
    """Put the parts together under the cell's final name; images stay in the files of their batches."""
    parts = [files.read_tensors(path) for path in sorted(work.folder.glob("part-*.safetensors"))]
    with files.new_folder(files.cell_folder(work.cell)) as folder:
        (folder / IMAGES).mkdir()
        for index in range(len(parts)):
            files.link(work.folder / IMAGES / batch_name(index), folder / IMAGES / batch_name(index))
        if work.quantized:
            shutil.copy(work.folder / QUANTIZED, folder / QUANTIZED)
            shutil.copy(work.folder / ERRORS, folder / ERRORS)
            quantized = read(Quantized, read_metadata(work.folder / QUANTIZED)["quantized"], QUANTIZED)
        else:
            names = ("latents", "noise", "timesteps")
            files.write_tensors(folder / TRAJECTORY, {name: parts[0][f"trajectory.{name}"] for name in names})
            size = parts[0]["size_mib"].item()
            quantized = Quantized(size, size, max(part["peak_memory_mib"].item() for part in parts))
        made = Made(
            device=_device_name(torch.device(work.device)),
            environment=environment.describe(work.device),
            sample_seconds=sum(part["seconds"].item() for part in parts),
            images=files.sha256_folder(folder / IMAGES),
            quantized=quantized,
        )
        outcome = Outcome("measured", "", work.settings, work.inputs, made)
        files.write_json(folder / OUTCOME, outcome.to_json())


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
