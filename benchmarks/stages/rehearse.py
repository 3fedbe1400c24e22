"""rehearse: quantise a task's network with random weights, to see what it takes and covers before there are weights.

Architecture, schedule, method, layers and precision are the cell's own; weights, latents and prompts are random, so
nothing is said about images. Settings can be made smaller than the suite's for a machine that is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from baselines import recipe_under
from benchmarks.planning import rehearsal_page
from benchmarks.planning.planner import KnownNetwork
from benchmarks.runtime import environment, files
from benchmarks.runtime.devices import device_of
from benchmarks.runtime.workspace import MIB, peak_memory, restart_peak
from benchmarks.stages import _setup
from benchmarks.stages.plan import build, describe, timesteps_of
from benchmarks.suite import discover
from benchmarks.suite.fields import read
from benchmarks.suite.params import Suite
from benchmarks.suite.record import FULL_PRECISION, Cell
from benchmarks.suite.tasks import Task
from tfmq.checkpoint import load_quantized, save_quantized
from tfmq.cost import plan_cost
from tfmq.network.backbone import Network, evaluate, full_precision_bytes
from tfmq.network.calibration import CalibrationSet
from tfmq.network.sampling import SamplingSettings
from tfmq.packing import packed_bytes
from tfmq.precision import Precision
from tfmq.quantization import quantize_
from tfmq.workspace import Workspace

FOLDER = files.RESULTS / "rehearsals"
PAGE = files.RESULTS / "REHEARSALS.md"


def run(suite: Suite, cell: Cell, changes: Mapping[str, object], device_name: str) -> str:
    """Quantise once; writes what it took to ``results/rehearsals`` and returns the page of all rehearsals.

    ``changes`` are settings of the method. Raises ValueError for unknown settings, methods that do not apply at the
    precision, and a task of no known architecture.
    """
    task, device = _setup.task_of(suite, cell.task), device_of(device_name)
    if cell.method == FULL_PRECISION:
        raise ValueError(f"{cell.name}: there is nothing to rehearse where nothing is quantised")
    method, settings = discover.method(cell.method), suite.settings(cell.task, cell.method)
    usual = read(method.config, settings, f"methods.{cell.method}")
    config = read(method.config, settings | dict(changes), f"settings of {cell.method}")
    precision = Precision.parse(cell.precision)
    protocol = method.protocol(cell.protocol)
    objection = method.lacks(cell.protocol) or method.objection(precision)
    if objection:
        raise ValueError(f"{cell.name} is not applicable: {objection}")
    described = describe(task)
    network = KnownNetwork(build(described.unet, torch.device("meta")), timesteps_of(task, described), described.tokens)
    pool = _pool(task, network, config, device)
    held = plan_cost(network.unet, precision, recipe_under(cell.protocol, config), _on_meta(pool), protocol).held
    files.WORK.mkdir(exist_ok=True)
    restart_peak(device)
    idle = peak_memory(device)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = build(described.unet, device)
    full_bytes = full_precision_bytes(unet)
    before = _predict(unet, pool)
    with TemporaryDirectory(prefix=".rehearse-", dir=files.WORK) as name:
        workspace = Workspace()
        workspace.allocate = partial(files.mapped, Path(name))
        generator = torch.Generator().manual_seed(0)
        report = quantize_(unet, precision, recipe_under(cell.protocol, config), pool, generator, protocol, workspace)
        peak = peak_memory(device)
        after, size = _predict(unet, pool), packed_bytes(unet)
        path = Path(name) / "quantized.safetensors"
        save_quantized(unet, path, {})
        del unet
        again = _predict(load_quantized(path).to(device), pool)
        stored = path.stat().st_size
    if not torch.equal(again, after):
        raise ValueError(f"{cell.name}: the stored network predicts other noise than the one that was stored")
    changed = {
        field.name: [getattr(usual, field.name), getattr(config, field.name)]
        for field in dataclasses.fields(config)
        if getattr(usual, field.name) != getattr(config, field.name)
    }
    files.write_json(
        FOLDER / f"{cell.task}-{cell.row}-{cell.precision}.json",
        {
            "cell": dataclasses.asdict(cell),
            "changed_settings": changed,
            "images_of_the_pool": pool.images,
            "images_of_the_suite": task.calibration_images,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "seconds": report.seconds,
            "effort": {
                "unet_evaluations": report.cost.unet_evaluations,
                "optimizer_steps": report.cost.optimizer_steps,
            },
            "peak_memory_mib": peak,
            "idle_memory_mib": idle,
            "planned_memory_mib": None if held is None else held / MIB,
            "full_precision_size_mib": full_bytes / MIB,
            "size_mib": size / MIB,
            "stored_mib": stored / MIB,
            "relative_error": ((after - before).norm() / before.norm()).item(),
            "coverage": [dataclasses.asdict(row) for row in report.coverage],
            "environment": environment.describe(str(device)),
        },
    )
    found = [files.read_json(path) for path in sorted(FOLDER.glob("*.json"))]
    text = rehearsal_page.page(found)
    files.write_text(PAGE, text)
    return text


def _pool(task: Task, network: KnownNetwork, config: object, device: torch.device) -> CalibrationSet:
    """Random rows at the time steps of the schedule, as many as the method's settings ask for."""
    wanted = max(getattr(config, name, None) or 1 for name in ("images", "range_images"))
    settings = SamplingSettings(task.steps, task.eta, task.guidance_scale)
    generator = torch.Generator(device).manual_seed(0)
    return network.random_pool(min(wanted, task.calibration_images), settings, device, generator)


def _on_meta(pool: CalibrationSet) -> CalibrationSet:
    of_steps = ("timesteps", "alphas")
    moved = {name: tensor if name in of_steps else tensor.to("meta") for name, tensor in pool.tensors.items()}
    return CalibrationSet.of(moved, pool.settings)


@torch.no_grad()
def _predict(unet: Network, pool: CalibrationSet) -> torch.Tensor:
    """The noise that a network predicts of the first image at the middle of the schedule, (1, C, H, W)."""
    middle = pool.steps // 2
    context = None if pool.context is None else pool.context[:1]
    inputs = {name: value[:1] for name, value in pool.inputs.items()}
    timestep = pool.timesteps[middle].to(pool.latents.device)
    return evaluate(unet, pool.latents[middle, :1], timestep, context, inputs).cpu()
