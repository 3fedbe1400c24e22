"""calibrate: a full-precision sampling pass of a task records a calibration pool, which all methods draw from.

There is one pool a calibration seed, each of other images.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import torch

from benchmarks.runtime import files
from benchmarks.runtime.devices import device_of
from benchmarks.runtime.workers import run_all
from benchmarks.stages._setup import conditioning_of, draw_noise, load_model, sampling_settings, task_of
from benchmarks.suite.params import Suite
from benchmarks.suite.tasks import Task
from tfmq.network.calibration import CalibrationSet, collect_calibration

PURPOSE = "calibration"


def run(suite: Suite, task_name: str, device_name: str, shards: int) -> None:
    """Write the pools of a task, which ``shards`` processes share, and what the first of them cost."""
    task = task_of(suite, task_name)
    device = device_of(device_name)
    torch.set_num_threads(1)
    with files.new_folder(files.calibration(task.name)) as folder:
        run_all(range(suite.pools), partial(_record, task, device, folder), shards, device)


def read_pool(task: Task, seed: int, device: torch.device) -> CalibrationSet:
    """The pool of a seed, on ``device``; what belongs to steps rather than images stays on the CPU."""
    tensors = files.read_tensors(files.calibration(task.name) / files.pool(seed))
    of_steps = ("timesteps", "alphas", "predicts")
    moved = {name: tensor if name in of_steps else tensor.to(device) for name, tensor in tensors.items()}
    return CalibrationSet.of(moved, sampling_settings(task))


def _record(task: Task, device: torch.device, folder: Path, seed: int) -> None:
    model = load_model(task, device)
    images = range(task.calibration_images)
    noise, step_noise = draw_noise(task, PURPOSE, seed, images, model.latent_shape)
    start = time.perf_counter()
    pool = collect_calibration(
        model.unet,
        model.scheduler,
        noise.to(device),
        sampling_settings(task),
        batch=task.batch,
        conditioning=conditioning_of(model, task, PURPOSE, images, seed),
        step_noise=step_noise.to(device),
    )
    seconds = time.perf_counter() - start
    files.write_tensors(folder / files.pool(seed), {name: tensor.cpu() for name, tensor in pool.tensors.items()})
    if seed == 0:
        halves = 1 if pool.unconditional is None else 2
        evaluations = halves * pool.steps * pool.images
        files.write_json(folder / files.COST, {"seconds": seconds, "unet_evaluations": evaluations})
