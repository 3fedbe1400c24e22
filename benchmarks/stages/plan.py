"""plan: what a suite or some of its tasks will cost, from settings, structure and one timed evaluation of each network.

Neither checkpoints nor downloads have to be there: what is not is planned from the architecture's published settings.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from torch.utils.flop_counter import FlopCounterMode

import baselines
from benchmarks.metrics import metrics
from benchmarks.planning import devices, rounds_page
from benchmarks.planning.expected import Effects, effects, expect
from benchmarks.planning.page import TERA, plan
from benchmarks.planning.planner import NOT_APPLICABLE, Item, KnownNetwork, Planner, Rate
from benchmarks.planning.rounds_page import Budget
from benchmarks.runtime import excerpt, files
from benchmarks.runtime.devices import device_of
from benchmarks.sources import catalogue
from benchmarks.sources.catalogue import Source
from benchmarks.sources.originals import expected
from benchmarks.sources.originals.architectures import ARCHITECTURES, TASKS
from benchmarks.stages import convert, fetch, prompts, weights
from benchmarks.stages._setup import SCHEDULERS, task_of
from benchmarks.suite import discover, params
from benchmarks.suite.params import Suite
from benchmarks.suite.record import FULL_PRECISION, Record
from benchmarks.suite.tasks import Task
from tfmq.closure import ROOT
from tfmq.network.attention_heads import set_attention_heads
from tfmq.network.backbone import Network, backbone_of, evaluate
from tfmq.network.conditioning import Inputs
from tfmq.numerics.steps import exact_steps

COMMON = "downloads besides checkpoints"
BEFORE = "calibrate", "reference"
REPORTED = Path(baselines.__file__).with_name("reported.csv")
CONFIG = "config.json"
SCHEDULER, TEXT = "scheduler/scheduler_config.json", "text_encoder/config.json"


@dataclass(frozen=True)
class Described:
    """The settings of a task's networks, and the bytes of the folder that they are or will be in."""

    unet: Mapping[str, object]
    scheduler: Mapping[str, object]
    tokens: int
    stored: int


def run(
    suite: Suite,
    tasks: Sequence[str],
    device_name: str,
    teraflops: float | None = None,
    methods: Sequence[str] = (),
    like: str | None = None,
) -> str:
    """A table for each of ``tasks``, or for all, with the cells of ``methods`` or all; nothing is written.

    Hours are those of the present device, of one that does ``teraflops`` 10^12 floating-point operations a second, or
    of the one that was measured under the name ``like``. Raises ValueError for unknown names, and for a task whose
    checkpoint is not there and of no known architecture.
    """
    params.check_methods(suite)
    measured = None if like is None else devices.load(like)
    for method in methods:
        if method not in suite.methods:
            raise discover.unknown("method", method, suite.methods, "Methods stand in params.yaml.")
    chosen = [task_of(suite, name) for name in tasks or suite.tasks]
    device = device_of(device_name)
    torch.set_num_threads(1)
    needed = set().union(*map(_needs, chosen))
    shared = [name for name in _sources() if name in needed and name not in suite.tasks]
    planned: dict[str, list[Item]] = {COMMON: _downloads(shared)} if shared else {}
    rates: dict[str, Rate] = {}
    timed: dict[str, Rate] = {}
    known = {} if suite.rounds is None else _effects()
    budgets: dict[str, Budget] = {}
    for task in chosen:
        described = describe(task)
        network = KnownNetwork(
            build(described.unet, torch.device("meta")), timesteps_of(task, described), described.tokens
        )
        rows = 1 if device.type == "cpu" else task.batch * (1 if task.guidance_scale <= 1 else 2)
        key = json.dumps([described.unet, rows], sort_keys=True, default=str)
        if key not in timed:
            rate = _time(described, device, rows)
            other = None if teraflops is None else rate.operations / teraflops / TERA
            timed[key] = dataclasses.replace(rate, assumed=other)
            checked = measured or devices.of(rate.device)
            if checked is not None and teraflops is None:
                timed[key] = devices.rate_on(rate, str(described.unet["_class_name"]), checked)
        rates[task.name] = timed[key]
        found = [*_downloads([task.name]), Item("checkpoint", disk=described.stored)]
        planner = Planner(suite, task, network, rates[task.name], methods)
        steps = planner.items()
        planned[task.name] = [*found, *steps]
        if suite.rounds is not None and task.name in suite.rounds.images and not methods:
            budgets[task.name] = _budget(planner, steps, known)
    told = rounds_page.part(budgets, suite, list(known)) if budgets else ""
    return plan(planned, rates, told)


def _budget(planner: Planner, steps: Sequence[Item], known: Effects) -> Budget:
    """What verdicts and FIDs of a task take; ``steps`` are those with all images of all cells."""
    suite, task = planner.suite, planner.task.name
    cells = [cell for cell in suite.cells() if cell.task == task and cell.method != FULL_PRECISION]
    refused = {item.name for item in steps if item.note == NOT_APPLICABLE}
    without = [cell for cell in cells if cell.name.removeprefix(f"{task}/") in refused]
    found = expect(suite, task, known, without)
    reported = [cell for cell in cells if (cell.method, cell.precision) in _reported(suite, task, cell.protocol)]
    first = [item for item in steps if item.name in (*BEFORE, FULL_PRECISION)]
    network, most = planner.network, float(suite.rounds.images[task][-1])
    return Budget(
        verdicts=dataclasses.replace(planner, drawn=found.images).items(),
        expected=found,
        most=dataclasses.replace(planner, drawn=dict.fromkeys(found.images, most)).items(),
        trajectories=2 * len(network.timesteps) * network.latents(1),
        reported=[*first, *planner.cells(reported)],
        whole=steps,
    )


def _reported(suite: Suite, task: str, protocol: str) -> set[tuple[str, str]]:
    """Methods and precisions whose FID a paper reports; papers quantise the layers of their own protocol."""
    if suite.reported is None or protocol != "published":
        return set()
    lines = csv.DictReader(REPORTED.read_text(encoding="utf-8").splitlines())
    names = suite.reported.tasks.get(task, ())
    return {(line["method"], line["precision"]) for line in lines if line["task"] in names and line["metric"] == "fid"}


def _effects() -> Effects:
    """The effects of all claims in the results of the small suite; none where these are not there."""
    records, values = [], {}
    for path in sorted((ROOT / files.RECORDS).rglob("*.json")):
        record = Record.load(path)
        if record.status == "measured" and path.with_suffix(".npz").is_file():
            records.append(record)
            values[record.cell] = excerpt.read_from(path.with_suffix(".npz")).values
    return effects(records, values, metrics())


def describe(task: Task) -> Described:
    """What is known of a task's networks, from its folder or else from its architecture's published settings.

    Raises ValueError where there is neither.
    """
    folder = Path(task.checkpoint)
    settings = folder / discover.family(task.family).network / CONFIG
    if settings.is_file():
        text = folder / TEXT
        stored = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        tokens = _json(text)["max_position_embeddings"] if text.is_file() else 1
        return Described(_json(settings), _json(folder / SCHEDULER), tokens, stored)
    if task.name not in TASKS:
        raise ValueError(f"{folder} is missing, and no architecture is known of {task.name}: run `dvc pull`")
    architecture = ARCHITECTURES[TASKS[task.name]]
    size = architecture.full
    parts = expected.expected(architecture, size).parts.values()
    stored = architecture.dtype.itemsize * sum(p.numel() for part in parts for p in part.network.parameters())
    heads = {} if size.heads is None else {"attention_heads": size.heads}
    tokens = 1 if size.text_encoder is None else size.text_encoder["max_position_embeddings"]
    return Described({**size.unet, **heads}, architecture.scheduler, tokens, stored)


def _json(path: Path) -> dict[str, object]:
    return json.loads(path.read_text(encoding="utf-8"))


def timesteps_of(task: Task, described: Described) -> torch.Tensor:
    """The time steps (T,) of a task's schedule."""
    module, name = SCHEDULERS[task.scheduler]
    scheduler = getattr(importlib.import_module(module), name).from_config(dict(described.scheduler))
    scheduler.set_timesteps(task.steps)
    return exact_steps(scheduler.timesteps)


def build(settings: Mapping[str, object], device: torch.device) -> Network:
    """A network with random weights."""
    own = dict(settings)
    heads = own.pop("attention_heads", None)  # not among diffusers' own settings
    with torch.device(device):
        unet = getattr(diffusers, settings["_class_name"]).from_config(own)
    if heads is not None:
        set_attention_heads(unet, heads)
    return unet.eval().requires_grad_(False)


@torch.no_grad()
def _time(described: Described, device: torch.device, rows: int) -> Rate:
    """Time one evaluation of so many samples at once, on a GPU after another one, which makes it ready.

    Its floating-point operations are counted on the meta device. Raises ValueError if a GPU has no room for so many.
    """
    with FlopCounterMode(display=False) as counter:
        shapes = build(described.unet, torch.device("meta"))
        evaluate(shapes, *random_inputs(shapes, described.tokens, 1))
    unet = build(described.unet, device)
    inputs = random_inputs(unet, described.tokens, rows)
    on_gpu = device.type == "cuda"
    try:
        if on_gpu:
            evaluate(unet, *inputs)
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        evaluate(unet, *inputs)
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
    except torch.cuda.OutOfMemoryError:
        raise ValueError(
            f"{rows} samples at once do not fit in the GPU's memory: give the task a smaller batch"
        ) from None
    name = torch.cuda.get_device_name(device) if on_gpu else "one thread of a CPU"
    return Rate(name, rows, seconds / rows, counter.get_total_flops(), on_cpu=not on_gpu)


def random_inputs(
    unet: Network, tokens: int, rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, Inputs]:
    """Random latents, a time step, a random conditioning and further inputs."""
    size, device = unet.config.sample_size, unet.device
    latents = torch.randn(rows, unet.config.in_channels, size, size, device=device)
    backbone = backbone_of(unet)
    condition = backbone.random_condition(unet, rows, tokens, device)
    return latents, torch.tensor(1, device=device), condition, backbone.random_inputs(unet, rows, device)


def _needs(task: Task) -> set[str]:
    """Names in `sources.yaml` of what a task needs besides its checkpoint."""
    found = {task.evaluator, task.second_evaluator}
    found |= {name for name, source in _sources().items() if str(fetch.DOWNLOADS / source.file) == task.statistics}
    found |= {name for name, clip in weights.CLIPS.items() if str(weights.DATA / "clip" / clip.weights) in task.clip}
    if task.prompts == str(prompts.FOLDER):
        found |= {prompts.NAME, *convert.TOKENIZER}
    return found


def _sources() -> dict[str, Source]:
    return catalogue.load(fetch.SOURCES) if fetch.SOURCES.is_file() else {}


def _downloads(names: Sequence[str]) -> list[Item]:
    """Files of `sources.yaml`; a checkpoint whose size no one publishes has that of its tensors."""
    found = []
    for name, source in _sources().items():
        if name in names:
            size = source.bytes
            if size is None and name in TASKS:
                architecture = ARCHITECTURES[TASKS[name]]
                shapes = expected.expected(architecture, architecture.full).shapes.values()
                size = architecture.dtype.itemsize * sum(math.prod(shape) for shape in shapes)
            found.append(Item(f"fetch {name}", disk=size))
    return found
