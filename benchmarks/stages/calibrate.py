"""calibrate: one full-precision sampling pass of a task records the calibration pool that all methods draw from."""

from __future__ import annotations

import time

import torch

from benchmarks.params import Suite, Task
from benchmarks.stages import files
from benchmarks.stages.setup import conditioning_of, device_of, draw_noise, load_model, sampling_settings, task_of
from tfmq.calibration import CalibrationSet, collect_calibration


def run(suite: Suite, task_name: str, device_name: str) -> None:
    """Write the pool of a task, and what it cost."""
    task = task_of(suite, task_name)
    device = device_of(device_name)
    torch.set_num_threads(suite.threads)
    model = load_model(task, device)
    images = range(task.calibration_images)
    noise, step_noise = draw_noise(task, "calibration", 0, images, model.latent_shape)
    start = time.perf_counter()
    pool = collect_calibration(
        model.unet,
        model.scheduler,
        noise.to(device),
        sampling_settings(task),
        batch=task.batch,
        conditioning=conditioning_of(model, images),
        step_noise=step_noise.to(device),
    )
    seconds = time.perf_counter() - start
    with files.new_folder(files.calibration(task.name)) as folder:
        files.write_tensors(folder / files.POOL, {name: tensor.cpu() for name, tensor in pool.tensors.items()})
        files.write_json(folder / files.COST, {"seconds": seconds, "unet_evaluations": pool.steps * pool.images})


def read_pool(task: Task, device: torch.device) -> CalibrationSet:
    """The pool of a task, on ``device``; what belongs to steps rather than images stays on the CPU."""
    tensors = files.read_tensors(files.calibration(task.name) / files.POOL)
    moved = {name: tensor if name in ("timesteps", "alphas") else tensor.to(device) for name, tensor in tensors.items()}
    return CalibrationSet(**moved, settings=sampling_settings(task))
