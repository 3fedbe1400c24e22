"""latency: what executes a task's network, how fast, and what it costs in quality.

Without weights (a task whose checkpoint is not there) they are random, ranges are those of one random row, and nothing
is said about images: speed, size and kernels do not depend on weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from baselines import recipe_under
from benchmarks.latency import Engine, Workload
from benchmarks.latency.engines import NNCF, engines
from benchmarks.latency.quality import errors, qualities
from benchmarks.latency.timing import INPUTS, MIB, Interval, Turn, take_turns
from benchmarks.report import deployment
from benchmarks.runtime import environment, files
from benchmarks.stages._setup import conditioning_of, draw_noise, load_model, sampling_settings, seed_of, task_of
from benchmarks.stages.plan import build, describe, timesteps_of
from benchmarks.suite import discover
from benchmarks.suite.fields import read
from benchmarks.suite.params import Suite
from benchmarks.suite.sections import Deployment
from benchmarks.suite.tasks import Task
from tfmq.export.roughly import quantize_roughly_
from tfmq.network.backbone import Network, backbone_of
from tfmq.network.calibration import CalibrationSet, collect_calibration
from tfmq.network.rows import CalibrationRows
from tfmq.precision import Precision
from tfmq.quantization import quantize_

FOLDER = files.RESULTS / "latency"
PROTOCOL = "deployable"
PACKAGES = ("openvino", "nncf")


def run(suite: Suite, task_name: str, leave_out: Sequence[str] = ()) -> str:
    """Measure one task; writes ``results/latency`` and returns the page of all that was measured.

    ``leave_out`` are names of engines. Raises ValueError for unknown names, a suite that says nothing of deployment,
    and an engine that fails or that this machine does not have.
    """
    task, wanted = task_of(suite, task_name), suite.deployment
    if wanted is None or task.name not in wanted.tasks:
        known = ", ".join(wanted.tasks) if wanted else "none"
        raise ValueError(f"{task.name} is none of the tasks under `deployment` of params.yaml, which are {known}")
    torch.set_num_threads(1)
    chosen = {engine.name: engine for engine in engines(list(wanted.precisions))}
    for name in leave_out:
        if name not in chosen:
            raise discover.unknown("engine", name, chosen, "Those of benchmarks/latency/engines.py are meant.")
        del chosen[name]
    missing = {name: engine.objection for name, engine in chosen.items() if engine.objection}
    if missing:
        raise ValueError(f"{next(iter(missing.values()))}. To measure the others: --without {' '.join(missing)}")
    random = not Path(task.checkpoint).exists()
    files.WORK.mkdir(exist_ok=True)
    with TemporaryDirectory(prefix=".latency-", dir=files.WORK) as name:
        folder = Path(name)
        found = _random(task, wanted, chosen, folder) if random else _trained(suite, task, wanted, chosen, folder)
        turns = take_turns(list(chosen), folder, wanted.threads, wanted.rounds, wanted.evaluations)
        sizes = {name: engine.size(folder / name) for name, engine in chosen.items()}
        kernels = {name: _kernels(folder / name) for name in chosen}
    rows = [
        {
            "engine": name,
            "label": engine.label,
            "precision": engine.precision,
            **_times(turns, name),
            "size_mib": sizes[name] / MIB,
            "integer_kernels": kernels[name],
            **found.get(name, {}),
        }
        for name, engine in chosen.items()
    ]
    versions = {package: metadata.version(package) for package in PACKAGES}
    files.write_json(
        FOLDER / f"{task.name}.json",
        {
            "task": task.name,
            "weights": "random" if random else "trained",
            "method": None if random else wanted.method,
            "batch": wanted.batch,
            "threads": wanted.threads,
            "rounds": wanted.rounds,
            "evaluations": wanted.evaluations,
            "images": 0 if random else wanted.images,
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "environment": environment.describe(),
            "versions": versions,
            "rows": rows,
        },
    )
    return deployment.write(FOLDER, files.RESULTS / "DEPLOYMENT.md")


def _random(task: Task, wanted: Deployment, chosen: dict[str, Engine], folder: Path) -> dict[str, dict[str, object]]:
    """Make the files of all engines for random weights, one quantised network in memory at a time."""
    described = describe(task)
    timesteps = timesteps_of(task, described).unique().tolist()
    unquantized = [engine for engine in chosen.values() if engine.precision == "w32a32" or isinstance(engine, NNCF)]

    def fresh() -> Network:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return build(described.unet, torch.device("cpu"))

    network = fresh()
    side, channels = network.config.sample_size, network.config.in_channels
    generator = torch.Generator().manual_seed(0)
    count = 2 * wanted.batch
    latents = torch.randn(count, channels, side, side, generator=generator)
    condition = backbone_of(network).random_condition(network, count, described.tokens, torch.device("cpu"), generator)
    rows = CalibrationRows(latents, torch.full((count,), timesteps[-1]), condition)
    _write_inputs(folder, rows[slice(0, wanted.batch)])
    for engine in unquantized:
        (folder / engine.name).mkdir()
        engine.make(Workload(network, {}, rows, wanted.batch, timesteps[-1:]), folder / engine.name)
    del network
    for precision in wanted.precisions:
        quantized = fresh()
        quantize_roughly_(quantized, Precision.parse(precision), timesteps, tokens=described.tokens)
        for engine in chosen.values():
            if engine.precision == precision and engine not in unquantized:
                (folder / engine.name).mkdir()
                workload = Workload(quantized, {precision: quantized}, rows, wanted.batch, timesteps)
                engine.make(workload, folder / engine.name)
        del quantized
    return {}


def _trained(
    suite: Suite, task: Task, wanted: Deployment, chosen: dict[str, Engine], folder: Path
) -> dict[str, dict[str, object]]:
    """Quantise a task's network, make the files of all engines, and measure what each costs in quality."""
    device = torch.device("cpu")
    model = load_model(task, device)
    pool = _recorded(task, "calibration", task.calibration_images)
    held_out = _recorded(task, "sample", wanted.images)
    method = discover.method(wanted.method)
    settings = suite.settings(task.name, wanted.method)
    recipe = recipe_under(PROTOCOL, read(method.config, settings, f"methods.{wanted.method}"))
    protocol = method.protocol(PROTOCOL)
    quantized = {}
    for precision in wanted.precisions:
        quantized[precision] = load_model(task, device).unet
        generator = torch.Generator().manual_seed(seed_of(task.name, task.version, "quantize", 0))
        quantize_(quantized[precision], Precision.parse(precision), recipe, pool, generator, protocol)
    rows = pool.spaced(pool.steps, wanted.images)
    workload = Workload(model.unet, quantized, rows, wanted.batch, pool.timesteps.unique().tolist())
    test = held_out.spaced(held_out.steps, wanted.batch)
    _write_inputs(folder, _at(test, workload.timesteps[-1], wanted.batch))
    loaded = {}
    for name, engine in chosen.items():
        (folder / name).mkdir()
        engine.make(workload, folder / name)
        loaded[name] = engine.load(folder / name, 1)
    torch.set_num_threads(1)
    by = {name: (engine.precision, loaded[name]) for name, engine in chosen.items()}
    by_error = errors(model.unet, quantized, by, test, wanted.batch)
    measured = qualities(task, model, held_out, quantized, by, wanted)
    return {name: by_error[name] | dataclasses.asdict(measured[name]) for name in chosen}


def _recorded(task: Task, purpose: str, images: int) -> CalibrationSet:
    """What full-precision sampling feeds the network, for the images of a purpose."""
    model = load_model(task, torch.device("cpu"))
    noise, step_noise = draw_noise(task, purpose, 0, range(images), model.latent_shape)
    return collect_calibration(
        model.unet,
        model.scheduler,
        noise,
        sampling_settings(task),
        batch=task.batch,
        conditioning=conditioning_of(model, task, purpose, range(images)),
        step_noise=step_noise,
    )


def _at(rows: CalibrationRows, step: int, count: int) -> CalibrationRows:
    return rows[(rows.timesteps == step).nonzero().flatten()[:count]]


def _write_inputs(folder: Path, rows: CalibrationRows) -> None:
    tensors: dict[str, Tensor] = {"latents": rows.latents, "timestep": rows.timesteps[:1]}
    files.write_tensors(folder / INPUTS, tensors | ({} if rows.context is None else {"condition": rows.context}))


def _times(turns: dict[str, list[Turn]], name: str) -> dict[str, object]:
    """Seconds of an evaluation, how many times faster than each full-precision engine, and peak memory."""

    def medians(of: str) -> list[float]:
        return [Interval.of(turn.seconds).value for turn in turns[of]]

    seconds = [second for turn in turns[name] for second in turn.seconds]
    references = [other for other in turns if other.endswith("w32a32")]
    return {
        "seconds": dataclasses.asdict(Interval.of(seconds)),
        "times_faster": {
            other: dataclasses.asdict(Interval.of([a / b for a, b in zip(medians(other), medians(name), strict=True)]))
            for other in references
        },
        "peak_memory_mib": max(turn.peak_memory_mib for turn in turns[name]),
    }


def _kernels(folder: Path) -> dict[str, int] | None:
    """Of an exported network, how many of its layers and products run in integer kernels."""
    path = folder / "export.json"
    if not path.is_file():
        return None
    rows = [row for row in files.read_json(path)["kernels"] if row["kind"] != "lookup table"]
    return {"integer": sum(row["integer"] for row in rows), "all": len(rows)}
