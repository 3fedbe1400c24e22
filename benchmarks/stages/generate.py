"""generate: quantise the models of a row's cells and sample their images; the full-precision cell only samples.

The work is a queue of units, for one process or many: quantising a cell, then its generation batches and its errors. A
unit takes one thread on a CPU and depends on no other but the cell's quantised checkpoint, so any number of processes
gives the same bytes. What is finished is kept in `.resume/`, under a name that holds the hash of settings, inputs and
code, until all cells are: a run that is killed, or of which a cell fails, goes on from there. What a quantisation
learns is kept in `work/learned/`, unit by unit, for every cell that begins alike.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path

import diffusers
import torch
from torch import Tensor

import baselines
from benchmarks.runtime import environment, files, manifest
from benchmarks.runtime.devices import device_of
from benchmarks.runtime.files import ERRORS, FLOAT32, IMAGES, OUTCOME, QUANTIZED, TRAJECTORY
from benchmarks.runtime.images import TENSOR, batch_name
from benchmarks.runtime.workers import run_units
from benchmarks.stages._setup import load_model, prompt_file, task_of
from benchmarks.stages._units import CHECK, PART, PURPOSE, Work, config_of, do, forget_networks, then
from benchmarks.suite import discover
from benchmarks.suite.fields import read
from benchmarks.suite.outcome import Made, Outcome, Quantized, TensorFloat32
from benchmarks.suite.params import Suite
from benchmarks.suite.record import FULL_PRECISION, SIMULATED, Cell
from benchmarks.suite.tasks import CHECKED, Task
from tfmq.checkpoint import read_metadata
from tfmq.closure import code_hash
from tfmq.network.backbone import backbone_of
from tfmq.plan import amended_plan, insert_quantizers
from tfmq.precision import Precision


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
    failures = run_units(units, do, shards, device, then=then)
    forget_networks()
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
    """Order cells so that those which can reuse another cell's learning come later."""
    seen: Counter[object] = Counter()
    order = []
    for work in works:
        beginning = _beginning(work) if work.quantized else work.cell
        order.append((seen[beginning], work))
        seen[beginning] += 1
    return [work for _, work in sorted(order, key=lambda entry: entry[0])]


def _beginning(work: Work) -> tuple[object, ...]:
    """What decides the part of a quantisation that comes before activations."""
    cell = work.cell
    recipe = baselines.recipe_under(cell.protocol, config_of(discover.method(cell.method), cell, work.overrides))
    shared = repr(tuple(takewhile(lambda step: not step.sees_activations, recipe)))
    return work.task.name, cell.protocol, cell.seed, Precision.parse(cell.precision).weight_bits, shared


def _remove_superseded(work: Work) -> None:
    """Remove unfinished work on the same cell with other code, settings or inputs."""
    name, _, key = work.folder.name.rpartition("-")
    for folder in work.folder.parent.glob(f"{name}-{'[0-9a-f]' * len(key)}"):
        if folder != work.folder:
            shutil.rmtree(folder)


def _prepare(suite: Suite, cell: Cell, device: torch.device) -> Work | None:
    """The work of a cell, with its folder in `.resume/`; None where it is not applicable, which is then the outcome.

    Raises ValueError where this machine does not have the cell's backend.
    """
    task = task_of(suite, cell.task)
    overrides, settings, inputs = suite.settings(cell.task, cell.method), {}, {}
    if cell.method != FULL_PRECISION:
        method = discover.method(cell.method)
        config = config_of(method, cell, overrides)
        settings = config.described()
        objection = _objection(method, cell) or _refusal(task, cell, config, device)
        if objection:
            with files.new_folder(files.cell_folder(cell)) as folder:
                files.write_json(folder / OUTCOME, Outcome("not applicable", objection).to_json())
            return None
        inputs["calibration"] = files.sha256(files.calibration(task.name) / files.pool(cell.seed))
        inputs["trajectory"] = files.sha256(files.cell_folder(files.full_precision_cell(cell)) / TRAJECTORY)
    inputs["checkpoint"] = manifest.verify(Path(task.checkpoint))
    if task.prompts is not None:
        inputs["prompts"] = files.sha256(prompt_file(task, PURPOSE))
    key = files.fingerprint(task.described(), asdict(cell), settings, inputs, str(device), _code(task, cell))
    resume = files.RESUME / cell.name
    return Work(task, cell, str(device), resume.with_name(f"{resume.name}-{key}"), overrides, settings, inputs)


def _objection(method: baselines.Method, cell: Cell) -> str:
    return method.lacks(cell.protocol) or method.objection(Precision.parse(cell.precision))


def _refusal(task: Task, cell: Cell, config: baselines.Settings, device: torch.device) -> str:
    """Why the cell's backend would not compute the quantised network, seen before anything is quantised."""
    if cell.backend == SIMULATED:
        return ""
    backend = discover.backend(cell.backend)
    backend.check(device)
    protocol = discover.method(cell.method).protocol(cell.protocol)
    network = load_model(task, torch.device("cpu")).unet
    recipe, precision = baselines.recipe_under(cell.protocol, config), Precision.parse(cell.precision)
    insert_quantizers(network, amended_plan(network, backbone_of(network), precision, recipe, protocol))
    return backend.refusal(network)


def _code(task: Task, cell: Cell) -> list[str]:
    """What besides settings and inputs decides a cell's bytes: its code, and the versions of what that calls."""
    entries = [Path(__file__), discover.file(discover.FAMILIES, task.family)]
    if cell.method != FULL_PRECISION:
        entries.append(discover.file(discover.METHODS, cell.method))
        entries.append(discover.file(discover.BACKENDS, cell.backend))
    return [code_hash(*entries), torch.__version__, diffusers.__version__]


def _finish(work: Work) -> None:
    """Put the parts together under the cell's final name; images stay in the files of their batches."""
    parts = [files.read_tensors(path) for path in sorted(work.folder.glob(f"{PART}-*.safetensors"))]
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
            checks = [files.read_tensors(path) for path in sorted(work.folder.glob(f"{CHECK}-*.safetensors"))]
            first = (checks or parts)[0]
            files.write_tensors(folder / TRAJECTORY, {name: first[f"trajectory.{name}"] for name in names})
            if checks:
                exact = torch.cat([check[TENSOR] for check in checks])[:CHECKED]
                files.write_tensors(folder / FLOAT32, {TENSOR: exact})
            size, memory = first["size_mib"].item(), max(part["peak_memory_mib"].item() for part in parts)
            details = {"tf32": asdict(_compared(parts, checks))} if work.task.tf32 else {}
            quantized = Quantized(size, size, memory, details=details)
        made = Made(
            device=_device_name(torch.device(work.device)),
            environment=environment.describe(work.device),
            sample_seconds=sum(part["seconds"].item() for part in parts),
            images=files.sha256_folder(folder / IMAGES),
            quantized=quantized,
        )
        outcome = Outcome("measured", "", work.settings, work.inputs, made)
        files.write_json(folder / OUTCOME, outcome.to_json())


def _compared(parts: Sequence[Mapping[str, Tensor]], checks: Sequence[Mapping[str, Tensor]]) -> TensorFloat32:
    """How far the first latents, in TF32, are from those in float32, if there are any."""
    if not checks:
        return TensorFloat32()
    fast, exact = (
        torch.cat([each["latents"] for each in batches])[:CHECKED].double().flatten(1)
        for batches in (parts[: len(checks)], checks)
    )
    found = (fast - exact).norm(dim=1) / exact.norm(dim=1)
    return TensorFloat32(len(found), found.mean().item(), found.max().item())


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
