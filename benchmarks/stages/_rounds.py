"""Drawing cells for the stage `rounds`: what the ranking statistic is made of, image by image."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import diffusers
import numpy as np
import torch
from torch import Tensor

from benchmarks.features import Features, compare, extract_with_maps
from benchmarks.metrics import Evidence, References, metrics, reference_statistics
from benchmarks.metrics._interval import mean_with_interval
from benchmarks.models import Model
from benchmarks.report.statistic import RANKED_BY
from benchmarks.runtime import environment, excerpt, files, manifest
from benchmarks.runtime.files import QUANTIZED
from benchmarks.stages._data_features import evaluator_of
from benchmarks.stages._setup import (
    batches,
    conditioning_of,
    draw_noise,
    load_model,
    prompt_file,
    sampling_settings,
    seed_of,
)
from benchmarks.stages._units import PURPOSE, Work, config_of, do, forget_networks
from benchmarks.suite import discover
from benchmarks.suite.fields import read
from benchmarks.suite.outcome import Quantized
from benchmarks.suite.params import Suite, Task
from benchmarks.suite.record import Cell, Cost, Record
from tfmq.checkpoint import load_quantized, read_metadata
from tfmq.closure import code_hash
from tfmq.network.backbone import Network
from tfmq.network.sampling import Step, predict_noise, sample
from tfmq.numerics.steps import exact_steps, step_value
from tfmq.passes.correction import correction_of
from tfmq.precision import Precision

RESULTS = files.RESULTS / "rounds"
FOLDER = files.WORK / "rounds"
FEATURES = ("pooled", "spatial", "logits")


def record_file(cell: Cell) -> Path:
    """The record of a cell that was drawn in rounds; the values of its images lie beside it."""
    return RESULTS / f"{cell.name}.json"


class Bench:
    """A task's full-precision model and its images, each made when it is first asked for."""

    def __init__(self, suite: Suite, task: Task, device: torch.device) -> None:
        self.suite, self.task, self.device = suite, task, device
        self.checkpoint = manifest.verify(Path(task.checkpoint))
        self.evaluator = evaluator_of(task, device)
        # Rounds are drawn in float32, whatever `tf32` says.
        others = ("images", "methods", "tf32")
        described = {name: value for name, value in asdict(task).items() if name not in others}
        prompts = "" if task.prompts is None else files.sha256(prompt_file(task, PURPOSE))
        code = code_hash(Path(__file__), discover.file(discover.FAMILIES, task.family))
        versions = torch.__version__, diffusers.__version__
        self.key = files.fingerprint(
            described, self.checkpoint, prompts, self.evaluator.identity, str(device), code, versions
        )

    @cached_property
    def model(self) -> Model:
        """In full precision."""
        return load_model(self.task, self.device)

    def draw(self, cell: Cell, count: int) -> None:
        """Write the record of a cell with ``count`` images, and the values of these beside it."""
        method = discover.method(cell.method)
        objection = method.lacks(cell.protocol) or method.objection(Precision.parse(cell.precision))
        if objection:
            files.write_text(record_file(cell), _refused(self.task, cell, objection).to_json())
            return
        overrides = self.suite.settings(cell.task, cell.method)
        settings = asdict(config_of(method, cell, overrides))
        inputs = {
            "checkpoint": self.checkpoint,
            "calibration": files.sha256(files.calibration(self.task.name) / files.pool(cell.seed)),
        }
        entries = [discover.file(discover.METHODS, cell.method), discover.file(discover.BACKENDS, cell.backend)]
        key = files.fingerprint(self.key, asdict(cell), settings, inputs, code_hash(*entries))
        work = Work(
            self.task, cell, str(self.device), FOLDER / f"{cell.name}-{key}", overrides, settings, inputs | {"key": key}
        )
        with files.exclusive(work.folder, cell.name):
            if not (work.folder / QUANTIZED).exists():
                do((work, QUANTIZED))
            forget_networks()
            network: Network | None = None
            paths = [work.folder / f"part-{index:05d}.safetensors" for index in range(self._batches(count))]
            for images, path in zip(batches(count, self.task.batch), paths, strict=True):
                if not path.exists():
                    network = network or self._quantized(work)
                    files.write_tensors(path, self._compare(network, images))
            parts = [files.read_tensors(path) for path in paths]
        together = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        self._write(work, count, together)

    def _batches(self, images: int) -> int:
        return len(batches(images, self.task.batch))

    def _quantized(self, work: Work) -> Network:
        network = load_quantized(work.folder / QUANTIZED).to(self.device)
        return discover.backend(work.cell.backend).network(network)

    def _full(self, images: range) -> dict[str, Tensor]:
        """Images of full precision and their trajectory, which are drawn once."""
        path = FOLDER / f"{self.task.name}-{self.key}" / f"{images.start:08d}.safetensors"
        if not path.exists():
            steps: list[Step] = []
            latents = self._sample(self.model.unet, images, steps)
            files.write_tensors(
                path,
                {
                    "images": self.model.decode(latents),
                    "latents": torch.stack([step.latents for step in steps]).cpu(),
                    "noise": torch.stack([step.noise for step in steps]).cpu(),
                    "timesteps": exact_steps([step.timestep for step in steps]),
                },
            )
        return files.read_tensors(path)

    def _sample(self, network: Network, images: range, steps: list[Step] | None = None) -> Tensor:
        noise, step_noise = draw_noise(self.task, PURPOSE, 0, images, self.model.latent_shape)
        return sample(
            network,
            self.model.scheduler,
            noise.to(self.device),
            sampling_settings(self.task),
            conditioning=conditioning_of(self.model, self.task, PURPOSE, images),
            step_noise=step_noise.to(self.device),
            callback=None if steps is None else steps.append,
        )

    @torch.no_grad()
    def _compare(self, network: Network, images: range) -> dict[str, Tensor]:
        """What the ranking statistic is made of, for one batch: one row an image."""
        exact = self._full(images)
        start = time.perf_counter()
        pixels = self.model.decode(self._sample(network, images))
        seconds = time.perf_counter() - start
        own, maps = extract_with_maps(self.evaluator, exact["images"])
        features, perceptual = compare(self.evaluator, pixels, maps)
        found = {
            "perceptual_distance": perceptual,
            "squared_error": (pixels.double() - exact["images"].double()).square().mean(dim=(1, 2, 3)),
            "trajectory_error": self._trajectory_error(network, exact, images),
            "seconds": torch.full((len(images),), seconds / len(images), dtype=torch.float64),
        }
        found |= {f"features.{name}": getattr(features, name) for name in FEATURES}
        return found | {f"paired.{name}": getattr(own, name) for name in FEATURES}

    def _trajectory_error(self, network: Network, exact: Mapping[str, Tensor], images: range) -> Tensor:
        """Relative errors of the predicted noise (N, T) along the trajectory of full precision."""
        correction = correction_of(network)
        conditioning = conditioning_of(self.model, self.task, PURPOSE, images)
        latents, noises, timesteps = (exact[name].to(self.device) for name in ("latents", "noise", "timesteps"))
        errors = []
        for point, noise, timestep in zip(latents, noises, timesteps, strict=True):
            predicted = predict_noise(network, point, timestep, conditioning, self.task.guidance_scale)
            if correction is not None:
                predicted, _ = correction(step_value(timestep), predicted, self.task.eta)
            errors.append((predicted - noise).flatten(1).norm(dim=1) / noise.flatten(1).norm(dim=1))
        return torch.stack(errors, 1).cpu()

    def _write(self, work: Work, count: int, found: dict[str, Tensor]) -> None:
        features, paired = (
            Features(**{name: found[f"{kind}.{name}"] for name in FEATURES}) for kind in ("features", "paired")
        )
        evidence = Evidence(
            features=features,
            references=References(reference_statistics(paired)),  # none of the metrics below looks at it
            paired_features=paired,
            squared_error=found["squared_error"],
            perceptual_distance=found["perceptual_distance"],
            trajectory_error=found["trajectory_error"],
        )
        known = metrics()
        values = {name: known[name].per_image(evidence) for name in RANKED_BY.metrics}
        measured = {
            name: mean_with_interval(each, torch.Generator().manual_seed(seed_of("score", name)))
            for name, each in values.items()
        }
        quantized = read(Quantized, read_metadata(work.folder / QUANTIZED)["quantized"], QUANTIZED)
        cell, cuda = work.cell, self.device.type == "cuda"
        seconds: dict[str, float] = {}
        for spent in quantized.passes:
            seconds[spent.name] = seconds.get(spent.name, 0.0) + spent.seconds
        record = _record(
            dataclasses.replace(self.task, images=count, tf32=False),
            cell,
            settings=work.settings,
            evaluator=self.evaluator.identity,
            metrics=measured,
            cost=Cost(
                device=torch.cuda.get_device_name(self.device) if cuda else "cpu",
                seconds=seconds | {"sample": found["seconds"].sum().item()},
                peak_memory_mib=quantized.peak_memory_mib,
                unet_evaluations=sum(spent.unet_evaluations for spent in quantized.passes),
                optimizer_steps=sum(spent.optimizer_steps for spent in quantized.passes),
                size_mib=quantized.size_mib,
                full_precision_size_mib=quantized.full_precision_size_mib,
                execution=cell.backend,
            ),
            inputs=work.inputs,
            environment=environment.describe(work.device),
        )
        shown = np.zeros((0, 3, self.task.resolution, self.task.resolution), dtype=np.uint8)
        arrays = {name: each.float().numpy() for name, each in values.items()}
        path = record_file(cell)
        excerpt.write_to(path.with_suffix(".npz"), excerpt.Excerpt(work.inputs["key"], shown, arrays))
        files.write_text(path, record.to_json())


def _refused(task: Task, cell: Cell, reason: str) -> Record:
    return _record(task, cell, status="not applicable", reason=reason)


def _record(
    task: Task,
    cell: Cell,
    settings: Mapping[str, object] | None = None,
    evaluator: str | None = None,
    **fields: object,
) -> Record:
    described = {"task": task.described(), "method": dict(settings or {}), "evaluator": evaluator}
    blank = {"status": "measured", "reason": "", "metrics": {}, "cost": None, "inputs": {}, "environment": {}}
    return Record(
        task=task.name,
        task_version=task.version,
        method=cell.method,
        precision=cell.precision,
        seed=cell.seed,
        protocol=cell.protocol,
        backend=cell.backend,
        settings=described,
        coverage={},
        details={},
        **(blank | fields),
    )
