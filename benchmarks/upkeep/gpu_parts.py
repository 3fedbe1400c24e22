"""The parts of the GPU check: each measures one thing and returns it as JSON can hold it, what is wrong as ``wrong``.

They work in a folder of their own, which has a tiny suite with random weights. Networks of full size have the published
settings, and random weights too: nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.features.efficientnet_lite0 import weight_name
from benchmarks.latency.timing import Interval
from benchmarks.planning.devices import EXECUTED, FLOAT32, SIMULATED, TERA, TF32, Speed
from benchmarks.planning.planner import GIB
from benchmarks.runtime import files, manifest
from benchmarks.runtime.devices import tf32
from benchmarks.stages import calibrate, generate, reference, rehearse, score
from benchmarks.stages.plan import build, describe, random_inputs
from benchmarks.suite import discover, params
from benchmarks.suite.params import Suite
from benchmarks.suite.record import FULL_PRECISION, Cell, Record
from benchmarks.upkeep import smoke
from benchmarks.upkeep.speed import quantize_quickly
from tfmq.execution import executing
from tfmq.modules.fake_quantize import StepTracker
from tfmq.modules.integer import IntegerLayer
from tfmq.modules.integer_products import Window, exact_parts, int_conv, int_mm, part_sizes
from tfmq.network.backbone import Network, evaluate
from tfmq.packing import tensors_hash
from tfmq.plan import quantized_layers
from tfmq.precision import Precision

PAPER = Path(__file__).parents[1] / "paper" / "params.yaml"
FULL_SIZE = ("lsun-bedrooms-ldm4", "coco-sd-v1-4")
TOY, METHOD, PRECISION, SPEED_PRECISION = "toy", "tfmq", "w4a8", "w8a8"
# TFLOP/s that the makers state, dense, for float32 without tensor cores, for TF32, and for 8-bit integers.
PEAKS = {
    "H200": {FLOAT32: 67.0, SIMULATED: 67.0, TF32: 494.7, EXECUTED: 1979.0},
    "H100": {FLOAT32: 67.0, SIMULATED: 67.0, TF32: 494.7, EXECUTED: 1979.0},
    "A100": {FLOAT32: 19.5, SIMULATED: 19.5, TF32: 156.0, EXECUTED: 624.0},
}
# An executed layer may be so far from the simulated one, relative to its largest output: float32 sums of up to 23,040
# products round by up to 2.5e-5 themselves.
MOST_OFF = 1e-4
ROUNDS = 5


@dataclass(frozen=True)
class Setup:
    """Where a part works, and what on.

    Attributes:
        device: to compute on.
        suite: tasks whose networks are measured, by the names ``tasks``.
        tiny: whether these are tiny.
        deadline: by `time.monotonic`, after which no further piece of work is begun.
    """

    device: torch.device
    suite: Suite
    tasks: tuple[str, ...]
    tiny: bool
    deadline: float

    @property
    def late(self) -> bool:
        """Whether the deadline has passed."""
        return time.monotonic() > self.deadline


def setup(device: torch.device, tiny: bool, seconds: float) -> Setup:
    """The networks to measure, of full size or tiny, and so many seconds for a part. Works in the current folder."""
    suite = params.load(Path("params.yaml") if tiny else PAPER)
    return Setup(device, suite, (TOY,) if tiny else FULL_SIZE, tiny, time.monotonic() + seconds)


def write_suite(folder: Path) -> None:
    """A suite of all methods on a tiny latent diffusion model, an evaluator and data, all random."""
    from safetensors.torch import save_file
    from timm.models import create_model

    from benchmarks.models.ldm import FAMILY
    from benchmarks.small.data import Emoji, write_sheet, write_table

    FAMILY.save_tiny(folder / "data" / TOY, 0)
    emoji, generator = folder / "data" / "emoji", torch.Generator().manual_seed(0)
    emoji.mkdir()
    write_sheet(torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8, generator=generator), emoji / "sheet.webp")
    write_table([Emoji(i, f"emoji {i}", "Objects", "google", "train") for i in range(5)], emoji / "emoji.csv")
    weights = folder / "data" / "efficientnet-lite0" / "model.safetensors"
    weights.parent.mkdir()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = create_model("tf_efficientnet_lite0", pretrained=False)
    save_file({weight_name(name): tensor for name, tensor in network.state_dict().items()}, weights)
    manifest.write(weights.parent)
    methods = [name for name in discover.names(discover.METHODS) if name != FULL_PRECISION]
    task: dict[str, object] = {"version": 1, "family": "ldm", "checkpoint": f"data/{TOY}", "dataset": "emoji"}
    task |= {"data": "data/emoji", "resolution": 32, "scheduler": "ddim", "steps": 4, "eta": 0.5, "guidance_scale": 1.0}
    task |= {"images": 6, "batch": 2, "calibration_images": 4, "reference_images": 4, "data_images": 5}
    task["evaluator"] = "efficientnet_lite0"
    table = {"protocol": "shared", "tasks": [TOY], "precisions": [PRECISION], "methods": methods}
    suite = {"name": "check", "tasks": {TOY: task}, "tables": {"leaderboard": table}}
    files.write_json(folder / "params.yaml", smoke.cut(suite | {"methods": {name: {} for name in methods}}))


def smoke_run(given: Setup) -> dict[str, object]:
    """Every stage up to scores, for every method on the tiny suite; wrong is what fails, or is not reached."""
    suite = params.load(Path("params.yaml"))
    cells = [*suite.cells()]
    device, done, wrong = given.device.type, [], []
    for stage in (calibrate, reference):
        stage.run(suite, TOY, device, 1)
    for cell in cells[: 4 if given.tiny else None]:
        if given.late:
            wrong.append(f"{cell.name}: not reached")
            continue
        try:
            generate.run(suite, [cell], device, 1)
            score.run(suite, [cell], device, 1)
            record = Record.load(files.record_file(cell))
            done.append(f"{cell.name}: {record.status}")
        except Exception as error:  # whatever it is: the next method may do
            wrong.append(f"{cell.name}: {in_a_line(error)}")
    return {"cells": done, "wrong": wrong}


def in_a_line(error: BaseException) -> str:
    """An error in a line, the first of a group."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def shards(given: Setup) -> dict[str, object]:
    """Do two processes give the bytes of one? Images and checkpoint of a cell, quantised and sampled twice."""
    suite = params.load(Path("params.yaml"))
    cells = [Cell(TOY, FULL_PRECISION, "w32a32"), Cell(TOY, METHOD, PRECISION)]
    calibrate.run(suite, TOY, given.device.type, 1)
    found: dict[int, dict[str, str]] = {}
    for count in (1, 2):
        for cell in cells:
            generate.run(suite, [cell], given.device.type, count)
        # Two processes quantise anew: nothing that was learned is kept.
        found[count] = {cell.name: files.sha256_folder(files.cell_folder(cell) / files.IMAGES) for cell in cells}
        found[count]["checkpoint"] = tensors_hash(files.read_tensors(files.cell_folder(cells[1]) / files.QUANTIZED))
        for folder in (files.LEARNED, *map(files.cell_folder, cells)):
            shutil.rmtree(folder, ignore_errors=True)
    differ = [name for name in found[1] if found[1][name] != found[2][name]]
    return {"compared": sorted(found[1]), "wrong": [f"{name}: two processes give other bytes" for name in differ]}


@torch.no_grad()
def agreement(given: Setup) -> dict[str, object]:
    """Do executed layers give what simulated ones give, and are sums of integers exact, on layers of all shapes?

    Wrong is an 8-bit product that is not exact, and a layer that is further off than rounding explains. That a sum in
    TF32 is not exact is told alone: layers use it only where a zero point lies outside the codes.
    """
    networks: dict[str, object] = {}
    wrong: list[str] = []
    for task in given.tasks:
        described = describe(given.suite.tasks[task])
        simulated = _random(described.unet, given.device)
        inputs = random_inputs(simulated, described.tokens, 2)
        full = evaluate(simulated, *inputs)
        quantize_quickly(simulated, Precision.parse(SPEED_PRECISION), inputs)
        executed = executing(simulated)
        layers = _layers_off(simulated, executed, inputs)
        expected, found = evaluate(simulated, *inputs), evaluate(executed, *inputs)
        sums = _sums(executed, layers, given)
        networks[task] = {
            "layers": len(layers),
            "layer_most_off": max(each.off for each in layers.values()),
            "executed_from_simulated": _relative(found, expected),
            "simulated_from_full_precision": _relative(expected, full),
            "executed_from_full_precision": _relative(found, full),
            **sums,
        }
        wrong += [f"{task}: {path} is {each.off:.2g} off" for path, each in layers.items() if each.off > MOST_OFF]
        wrong += [f"{task}: {path} is not exact in 8 bits" for path in sums["int8_not_exact"]]
        del simulated, executed
    return {"largest_exact_tf32_sum": largest_exact(given.device), "networks": networks, "wrong": wrong}


@dataclass(frozen=True)
class _Seen:
    """A layer's input, and how far its executed output is from the simulated one, relative to the largest output."""

    shape: tuple[int, ...]
    off: float


@torch.no_grad()
def _layers_off(simulated: Network, executed: Network, inputs: tuple[Tensor, ...]) -> dict[str, _Seen]:
    """Each executed layer on the very input that the simulated one gets, by path."""
    seen: dict[str, _Seen] = {}

    def compare(path: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            twin = executed.get_submodule(path)
            if isinstance(twin, IntegerLayer):
                off = (twin(args[0].clone()) - output).abs().max() / output.abs().max()
                seen[path] = _Seen(tuple(args[0].shape), off.item())

        return hook

    hooks = [layer.register_forward_hook(compare(path)) for path, layer in quantized_layers(simulated).items()]
    try:
        tracker: StepTracker = executed.step_tracker
        tracker.set(inputs[1])
        evaluate(simulated, *inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


@torch.no_grad()
def _sums(executed: Network, layers: dict[str, _Seen], given: Setup) -> dict[str, object]:
    """Layers, one of each shape, whose sums of random codes are not those in float64: by 8-bit products, and in TF32.

    "most_parts" is how many parts TF32 took the longest sum in.
    """
    found: dict[str, list[str]] = {"int8_not_exact": [], "tf32_not_exact": []}
    shapes, most, generator = set(), 0, torch.Generator().manual_seed(0)
    for path, layer in layers.items():
        module = executed.get_submodule(path)
        for weight in module.weights:
            key = (layer.shape, tuple(weight.codes.shape), module.window)
            if key in shapes or given.late:
                continue
            shapes.add(key)
            channels = weight.codes.shape[1]
            size = (2, channels, *layer.shape[2:]) if module.window else (64, channels)
            codes = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator).to(given.device)
            magnitudes = weight.codes.abs().long().unsqueeze(-1).flatten(2).sum(2).cpu()
            sizes, window = part_sizes(magnitudes, 128), module.window
            most = max(most, len(sizes))
            exact = _product(codes.double() - 128, weight.codes.double(), window)
            integers = int_conv(codes, 128, weight.codes, window) if window else int_mm(codes, 128, weight.codes)
            floats = exact_parts(codes.float() - 128, weight.codes.float(), window, sizes, 128)
            if not torch.equal(integers.double(), exact):
                found["int8_not_exact"].append(path)
            if not torch.equal(floats.double(), exact):
                found["tf32_not_exact"].append(path)
    return found | {"shapes": len(shapes), "most_parts": most}


def _product(x: Tensor, weight: Tensor, window: Window | None) -> Tensor:
    return F.linear(x, weight) if window is None else F.conv2d(x, weight, None, *window.lists)


@torch.no_grad()
def largest_exact(device: torch.device) -> int:
    """The largest power of two, up to 2^24, up to which sums of products are exact in TF32; on a CPU, in float32."""
    largest = 0
    for power in range(16, 25):
        terms = 2**power // 255**2
        a = torch.full((64, terms), 255.0, device=device)
        a[:, 0] -= torch.arange(64, device=device)
        b = torch.full((terms, 64), 255.0, device=device)
        with tf32(True):
            found = a @ b
        if not torch.equal(found.double(), a.double() @ b.double()):
            break
        largest = 2**power
    return largest


def _relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def _random(settings: dict[str, object], device: torch.device) -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build(settings, device)


@torch.no_grad()
def speed(given: Setup) -> dict[str, object]:
    """Evaluations a second in float32, TF32, simulated and executed at w8a8, and what of the card's peak that is."""
    name = torch.cuda.get_device_name(given.device) if given.device.type == "cuda" else ""
    peaks = next((found for card, found in PEAKS.items() if card in name), {})
    speeds: list[Speed] = []
    memory: dict[str, float] = {}
    for task_name in given.tasks:
        task = given.suite.tasks[task_name]
        described = describe(task)
        rows = task.batch * (1 if task.guidance_scale <= 1 else 2)
        network = _random(described.unet, given.device)
        inputs = random_inputs(network, described.tokens, rows)
        shapes = build(described.unet, torch.device("meta"))
        with FlopCounterMode(display=False) as counter:
            evaluate(shapes, *random_inputs(shapes, described.tokens, 1))
        operations = counter.get_total_flops()
        for kind in (FLOAT32, TF32, SIMULATED, EXECUTED):
            if kind == SIMULATED:
                quantize_quickly(network, Precision.parse(SPEED_PRECISION), random_inputs(network, described.tokens, 2))
            elif kind == EXECUTED:
                network = executing(network)
            if given.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(given.device)
            with tf32(kind == TF32):
                seconds = Interval.of(timed(partial(evaluate, network, *inputs), given.device)).value
            if given.device.type == "cuda":
                memory[f"{task_name}, {kind}"] = torch.cuda.max_memory_allocated(given.device) / GIB
            rate = operations * rows / seconds / TERA
            share = rate / peaks[kind] if kind in peaks else None
            speeds.append(Speed(described.unet["_class_name"], kind, rows, rows / seconds, rate, share))
        del network
    return {"speeds": [dataclasses.asdict(each) for each in speeds], "memory_gib": memory, "peaks": peaks}


def timed(do: Callable[[], object], device: torch.device) -> list[float]:
    """Seconds of each round; one before does not count."""
    seconds = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        do()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def learning(given: Setup) -> dict[str, object]:
    """Seconds of the phases of TFMQ-DM on the first network, with few images and iterations, and memory beside plan.

    "evaluations_a_learned_row" is what a row that is learned on takes, in evaluations of full precision.
    """
    task = given.suite.tasks[given.tasks[0]]
    settings = {"iterations": 20, "temporal_iterations": 20, "images": 16, "steps": 4, "batch": 32}
    if given.tiny:
        settings = {"iterations": 2, "temporal_iterations": 2, "images": 2, "steps": 2, "batch": 4}
    rehearse.run(given.suite, Cell(task.name, METHOD, PRECISION), settings, given.device.type)
    found = files.read_json(rehearse.FOLDER / f"{task.name}-{METHOD}-{PRECISION}.json")
    described = describe(task)
    network = _random(described.unet, given.device)
    inputs = random_inputs(network, described.tokens, settings["batch"])
    with torch.no_grad():
        row = Interval.of(timed(partial(evaluate, network, *inputs), given.device)).value / settings["batch"]
    learned = settings["iterations"] * min(settings["batch"], settings["images"] * settings["steps"])
    held = found["peak_memory_mib"] - found["idle_memory_mib"]
    planned = found["planned_memory_mib"]
    return {
        "task": task.name,
        "settings": settings,
        "seconds": found["seconds"],
        "effort": found["effort"],
        # Blocks are learned one after the other: an iteration on all of them is one on the network.
        "evaluations_a_learned_row": found["seconds"]["block reconstruction"] / learned / row,
        "peak_memory_mib": held,
        "planned_memory_mib": planned,
        "planned_over_peak": planned / held if planned and held > 0 else None,
        "relative_error": found["relative_error"],
    }
