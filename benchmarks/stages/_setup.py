"""What several stages begin with: the task's model, and the noise and prompts of its images."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benchmarks.models import Model
from benchmarks.runtime.text import read_lines
from benchmarks.suite import discover
from benchmarks.suite.params import Suite
from benchmarks.suite.record import FULL_PRECISION, Cell
from benchmarks.suite.tasks import Task

if TYPE_CHECKING:  # importing diffusers takes seconds, and not all stages need it
    from tfmq.network.sampling import Conditioning, SamplingSettings

# Modules and classes; the names are checked by `benchmarks.suite.tasks`.
SCHEDULERS = {
    "ddim": ("diffusers", "DDIMScheduler"),
    "ddim_quad": ("benchmarks.models._quad", "QuadDDIMScheduler"),
    "pndm": ("diffusers", "PNDMScheduler"),
    "euler": ("diffusers", "EulerDiscreteScheduler"),
}


def task_of(suite: Suite, name: str) -> Task:
    """The task of that name. Raises ValueError with the nearest name if the suite has none."""
    if name not in suite.tasks:
        raise discover.unknown("task", name, suite.tasks, "Tasks stand in params.yaml.")
    return suite.tasks[name]


def cells_of(
    suite: Suite, table: str | None, task: str, method: str, precisions: Sequence[str] = (), seed: int | None = None
) -> list[Cell]:
    """The cells of one row of a table, all or those at ``precisions`` or of a ``seed``; full precision is in none.

    Raises ValueError with the nearest name for names that the suite or the table does not have, and for a seed that
    no precision has.
    """
    task_of(suite, task)
    if method == FULL_PRECISION:
        if seed not in (None, 0):
            raise ValueError(f"seed {seed} is a calibration seed: full precision has 0 alone")
        return [Cell(task, FULL_PRECISION, "w32a32")]
    if table not in suite.tables:
        raise discover.unknown("table", table, suite.tables, "Tables stand in params.yaml.")
    found = suite.tables[table]
    if task not in found.tasks:
        raise discover.unknown(f"task in table {table}", task, found.tasks, "Tables stand in params.yaml.")
    if method not in found.methods:
        raise discover.unknown("method", method, [*found.methods, FULL_PRECISION], f"Those of {table} are meant.")
    for precision in precisions:
        if precision not in found.precisions:
            raise discover.unknown("precision", precision, found.precisions, f"Those of {table} are meant.")
    cells = [
        Cell(task, method, precision, each, found.protocol, found.backend)
        for precision in precisions or found.precisions
        for each in found.seeds_of(precision)
        if seed in (None, each)
    ]
    if not cells:
        raise ValueError(f"no cell has seed {seed}: `seeds` of table {table} says how many a precision has")
    return cells


def load_model(task: Task, device: torch.device) -> Model:
    """The full-precision model of a task, on ``device``, with the task's kind of scheduler."""
    model = discover.family(task.family).load(Path(task.checkpoint), device)
    module, name = SCHEDULERS[task.scheduler]
    scheduler = getattr(importlib.import_module(module), name).from_config(model.scheduler.config)
    return dataclasses.replace(model, scheduler=scheduler)


def sampling_settings(task: Task) -> SamplingSettings:
    """The task's part of the denoising loop."""
    from tfmq.network.sampling import SamplingSettings

    return SamplingSettings(task.steps, task.eta, task.guidance_scale)


def seed_of(*parts: object) -> int:
    """A 63-bit seed from names and numbers."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def draw_noise(
    task: Task, purpose: str, seed: int, images: range, shape: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """Noise of some images: the starting latents (N, C, H, W), and each step's noise (steps, N, C, H, W) for eta > 0.

    Each image has its own generator, on the CPU, seeded from task, purpose, seed and the image's index alone; so any
    batch, shard, method or device gives an image the same noise. Without eta the second tensor has no steps.
    """
    draws = 1 + (task.steps if task.eta > 0 else 0)
    noise = torch.stack(
        [
            torch.randn(
                draws,
                *shape,
                generator=torch.Generator().manual_seed(seed_of(task.name, task.version, purpose, seed, index)),
            )
            for index in images
        ],
        1,
    )
    return noise[0], noise[1:]


def prompts_of(task: Task, purpose: str, images: range, seed: int = 0) -> list[str]:
    """The prompts of some images of a conditional task: image i takes line i of its list, over and over.

    Images of ``calibration`` have a list of their own, where those of a seed follow those of the seed before. Raises
    ValueError if the list is missing or empty.
    """
    path = prompt_file(task, purpose)
    lines = read_lines(path) if path.is_file() else []
    if not lines or not all(line.strip() for line in lines):
        raise ValueError(f"{path} is missing, empty or has an empty line: write one prompt a line")
    start = seed * task.calibration_images if purpose == "calibration" else 0
    return [lines[(start + index) % len(lines)] for index in images]


def prompt_file(task: Task, purpose: str) -> Path:
    """The list of prompts of a conditional task's images."""
    return Path(task.prompts) / ("calibration.txt" if purpose == "calibration" else "evaluation.txt")


def conditioning_of(model: Model, task: Task, purpose: str, images: range, seed: int = 0) -> Conditioning | None:
    """What ``images`` are conditioned on, or None; without guidance there is no unconditional half.

    Raises ValueError if the model needs prompts and the task has none, or the other way round, and for prompts that are
    missing or that the model does not know.
    """
    if (model.conditioning is None) != (task.prompts is None):
        have, does = ("no prompts", "needs them") if task.prompts is None else ("prompts", "takes none")
        raise ValueError(f"task {task.name} has {have}, but a model of family {task.family} {does}")
    if model.conditioning is None:
        return None
    conditioning = model.conditioning(prompts_of(task, purpose, images, seed))
    return conditioning if task.guidance_scale > 1 else dataclasses.replace(conditioning, unconditional=None)


def batches(images: int, batch: int) -> list[range]:
    """Image indices cut into generation batches."""
    return [range(start, min(start + batch, images)) for start in range(0, images, batch)]
