"""study: how near methods come to full precision, against the time and the optimiser steps that they take.

A curve is a method with some settings varied; each of its points is quantised from nothing, on each calibration seed.
What is measured is the error of the predicted noise, and how far the final latents are from full precision's, on noise
that no cell and no calibration uses. Finished points are kept: a run that was stopped goes on, and a run with other
settings measures what is new.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import time
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from baselines import recipe_under
from benchmarks.metrics._interval import mean_with_interval
from benchmarks.report import study
from benchmarks.runtime import environment, files
from benchmarks.stages._setup import conditioning_of, draw_noise, load_model, sampling_settings, seed_of, task_of
from benchmarks.suite import discover
from benchmarks.suite.fields import read
from benchmarks.suite.params import Suite
from benchmarks.suite.sections import Study
from benchmarks.suite.tasks import Task
from tfmq.closure import code_hash
from tfmq.network.backbone import Network
from tfmq.network.calibration import CalibrationSet, collect_calibration
from tfmq.network.sampling import predict_noise, sample
from tfmq.passes import Recipe
from tfmq.passes.correction import correction_of
from tfmq.precision import Precision
from tfmq.quantization import quantize_

FOLDER = files.RESULTS / "study"
PAGE = files.RESULTS / "STUDY.md"
CALIBRATION, HELD_OUT = "calibration", "study"


@dataclass(frozen=True)
class Point:
    """One quantisation that a study measures.

    Attributes:
        curve: its label.
        method, settings: what quantises, with what differs from the method's settings in the suite.
        protocol: which layers, and on which grids.
        precision, seed: of the quantisation.
        pool: calibration images; none means as many as the task has.
    """

    curve: str
    method: str
    settings: dict[str, object]
    protocol: str
    precision: str
    seed: int
    pool: int | None = None


def points(found: Study, task: str) -> list[Point]:
    """All points of a task: seed by seed, so that a run that was stopped has whole curves."""
    return [
        Point(label, curve.method, curve.settings | varied, curve.protocol, precision, seed, curve.pool)
        for seed in range(found.seeds)
        for label, curve in found.curves.items()
        if task in (curve.tasks or found.tasks) and (not seed or curve.seeds)
        for precision in curve.precisions or found.precisions
        for varied in curve.points or ({},)
    ]


def run(suite: Suite, task_name: str) -> str:
    """Measure all points of one task that are new; writes ``results/study`` and returns the page of all tasks.

    Raises ValueError for a task that is not under ``study`` of params.yaml, and for a curve whose method does not have
    its settings, or does not apply.
    """
    task, wanted = task_of(suite, task_name), suite.study
    if wanted is None or task.name not in wanted.tasks:
        known = ", ".join(wanted.tasks) if wanted else "none"
        raise ValueError(f"{task.name} is none of the tasks under `study` of params.yaml, which are {known}")
    recipes = [(point, recipe_of(suite, task, point)) for point in points(wanted, task.name)]
    torch.set_num_threads(1)
    path = FOLDER / f"{task.name}.json"
    kept = {row["key"]: row for row in files.read_json(path)["points"]} if path.is_file() else {}
    rows = []
    bench, described = Bench(task, wanted.images), {"task": task.name, "images": wanted.images}
    for point, recipe in tqdm(recipes, desc=task.name, unit="point"):
        address = _address(task, wanted, point, recipe)
        if address not in kept:
            kept[address] = {"key": address, **dataclasses.asdict(point), **bench.measure(point, recipe)}
        rows.append(kept[address] | dataclasses.asdict(point))  # a point that was kept may be of another curve now
        measured = {row["key"] for row in rows}
        waiting = [row for key, row in kept.items() if key not in measured]  # this run may come to them yet
        files.write_json(path, described | {"environment": environment.describe(), "points": [*rows, *waiting]})
    files.write_json(path, described | {"environment": environment.describe(), "points": rows})
    return study.write(FOLDER, PAGE)


class Bench:
    """A task's model, its pools, and the images that are held out, each made when it is first asked for."""

    def __init__(self, task: Task, images: int) -> None:
        self.task, self.images = task, images
        self.model = load_model(task, torch.device("cpu"))
        self.calibration = cache(
            lambda seed, images=None: self._pool(CALIBRATION, seed, images or task.calibration_images)
        )

    @cached_property
    def held_out(self) -> CalibrationSet:
        """What full-precision sampling feeds the network for the images that are held out."""
        return self._pool(HELD_OUT, 0, self.images)

    def _pool(self, purpose: str, seed: int, images: int) -> CalibrationSet:
        noise, step_noise = draw_noise(self.task, purpose, seed, range(images), self.model.latent_shape)
        return collect_calibration(
            self.model.unet,
            self.model.scheduler,
            noise,
            sampling_settings(self.task),
            batch=self.task.batch,
            conditioning=conditioning_of(self.model, self.task, purpose, range(images), seed),
            step_noise=step_noise,
        )

    def measure(self, point: Point, recipe: Recipe) -> dict[str, object]:
        """Quantise once; what that takes, and how near to full precision it comes."""
        pool = self.calibration(point.seed, point.pool)
        network = load_model(self.task, torch.device("cpu")).unet
        generator = torch.Generator().manual_seed(seed_of(self.task.name, self.task.version, "quantize", point.seed))
        start = time.process_time()
        protocol = discover.method(point.method).protocol(point.protocol)
        report = quantize_(network, Precision.parse(point.precision), recipe, pool, generator, protocol)
        seconds = time.process_time() - start
        errors, deviation = self.errors(network), self.deviation(network)
        draws = torch.Generator().manual_seed(0)
        return {
            "cpu_seconds": seconds,
            "optimizer_steps": report.cost.optimizer_steps,
            "evaluations": report.cost.unet_evaluations,
            "noise_error": dataclasses.asdict(mean_with_interval(errors.mean(0), draws)),
            "deviation": dataclasses.asdict(mean_with_interval(deviation, draws)),
            "median_deviation": deviation.median().item(),
        }

    @torch.no_grad()
    def errors(self, network: Network) -> Tensor:
        """Relative errors of the predicted noise (steps, images) along the full-precision trajectory."""
        correction, pool = correction_of(network), self.held_out
        conditioning = conditioning_of(self.model, self.task, HELD_OUT, range(self.images))
        found = []
        for latents, noise, step in zip(pool.latents, pool.noise, pool.timesteps, strict=True):
            predicted = predict_noise(network, latents, step, conditioning, self.task.guidance_scale)
            if correction is not None:
                predicted, _ = correction(step.item(), predicted, self.task.eta)
            found.append((predicted - noise).flatten(1).norm(dim=1) / noise.flatten(1).norm(dim=1))
        return torch.stack(found)

    def deviation(self, network: Network) -> Tensor:
        """Relative distance of the final latents to full precision's (images,)."""
        noise, step_noise = draw_noise(self.task, HELD_OUT, 0, range(self.images), self.model.latent_shape)
        latents = sample(
            network,
            self.model.scheduler,
            noise,
            sampling_settings(self.task),
            conditioning=conditioning_of(self.model, self.task, HELD_OUT, range(self.images)),
            step_noise=step_noise,
        )
        exact = self.held_out.samples
        return (latents - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)


def recipe_of(suite: Suite, task: Task, point: Point) -> Recipe:
    """The passes of a point. Raises ValueError where its method does not apply, or does not have its settings."""
    method = discover.method(point.method)
    objection = method.lacks(point.protocol) or method.objection(Precision.parse(point.precision))
    if objection:
        raise ValueError(f"study.curves.{point.curve} is not applicable at {point.precision}: {objection}")
    settings = suite.settings(task.name, point.method) | point.settings
    return recipe_under(point.protocol, read(method.config, settings, f"study.curves.{point.curve}"))


def _address(task: Task, wanted: Study, point: Point, recipe: Recipe) -> str:
    """The hash of all that decides a point: it is measured anew where code or settings have changed.

    On another processor too, since seconds are to be compared.
    """
    machine = environment.machine()
    code = code_hash(*sorted({Path(inspect.getfile(type(step))) for step in recipe}))
    described = [
        repr(task),
        wanted.images,
        point.protocol,
        point.precision,
        point.seed,
        [repr(step) for step in recipe],
        code,
        [machine["cpu"], machine["instructions"]],
    ]
    if point.pool is not None:
        described.append(point.pool)
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]
