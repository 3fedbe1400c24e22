"""Drawing cells for the stage `rounds`: what the ranking statistic is made of, image by image."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path

import diffusers
import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from benchmarks.features import Features, compare, extract, extract_with_maps, extractor
from benchmarks.metrics import Evidence, References, metrics, reference_statistics
from benchmarks.metrics._interval import mean_with_interval
from benchmarks.models import Model
from benchmarks.report.statistic import RANKED_BY
from benchmarks.runtime import environment, excerpt, files, manifest
from benchmarks.runtime.files import QUANTIZED
from benchmarks.runtime.workspace import MIB, peak_memory
from benchmarks.stages._data_features import EVALUATORS, evaluator_of
from benchmarks.stages._drawn import full_record_file, record_file
from benchmarks.stages._setup import (
    batches,
    conditioning_of,
    draw_noise,
    load_model,
    prompt_file,
    sampling_settings,
    seed_of,
)
from benchmarks.stages._units import PART, PURPOSE, Work, config_of, do, forget_networks, unit_name
from benchmarks.suite import discover
from benchmarks.suite.fields import read
from benchmarks.suite.outcome import Quantized
from benchmarks.suite.params import Suite
from benchmarks.suite.record import FULL_PRECISION, Cell, Cost, Record, Value
from benchmarks.suite.tasks import Task
from tfmq.checkpoint import load_quantized, read_metadata
from tfmq.closure import code_hash
from tfmq.network.backbone import Network, full_precision_bytes
from tfmq.network.sampling import Step, predict_noise, sample
from tfmq.numerics.steps import exact_steps, step_value
from tfmq.passes.correction import correction_of
from tfmq.precision import Precision

FOLDER = files.WORK / "rounds"
FEATURES = ("pooled", "spatial", "logits")


@dataclass(frozen=True)
class Sources:
    """What a task's cells are made from now. A hash is taken once, when a record is first held against it.

    Attributes:
        device: that evaluators are loaded on.
        pools: the hash of each seed's calibration pool, None where it is not there.
    """

    task: Task
    device: torch.device
    pools: dict[int, str | None] = field(default_factory=dict)

    def made(self, record: Record) -> bool:
        """Whether a record is of the present checkpoint, prompts, evaluator and calibration pool.

        What it does not say, and what is not there to compare with, decides nothing. Raises ValueError for an evaluator
        whose weights are damaged.
        """
        says: dict[str, object] = {**record.inputs, "evaluator": record.settings.get("evaluator")}
        present: dict[str, Callable[[], str | None]] = {
            "checkpoint": lambda: self.checkpoint,
            "prompts": lambda: self.prompts,
            "evaluator": lambda: self.evaluator,
            "calibration": lambda: self._pool(record.seed),
        }
        return all(says.get(name) is None or find() in (None, says[name]) for name, find in present.items())

    @cached_property
    def checkpoint(self) -> str | None:
        """Hash of the checkpoint's manifest, which names all its files."""
        return _hash(Path(self.task.checkpoint) / manifest.NAME)

    @cached_property
    def prompts(self) -> str | None:
        """Hash of the prompts that images are drawn for."""
        return None if self.task.prompts is None else _hash(prompt_file(self.task, PURPOSE))

    @cached_property
    def evaluator(self) -> str | None:
        """The evaluator's identity."""
        listing = EVALUATORS / extractor(self.task.evaluator).weights / manifest.NAME
        return evaluator_of(self.task, self.device).identity if listing.is_file() else None

    def _pool(self, seed: int) -> str | None:
        if seed not in self.pools:
            self.pools[seed] = _hash(files.calibration(self.task.name) / files.pool(seed))
        return self.pools[seed]


class Bench:
    """A task's full-precision model and its images, each made when it is first asked for."""

    def __init__(self, suite: Suite, task: Task, device: torch.device) -> None:
        self.suite, self.task, self.device = suite, task, device
        self.checkpoint = manifest.verify(Path(task.checkpoint))
        self.evaluator = evaluator_of(task, device)
        # Rounds are drawn in float32, whatever `tf32` says.
        described = {name: value for name, value in asdict(task).items() if name not in ("images", "tf32")}
        self.prompts = "" if task.prompts is None else files.sha256(prompt_file(task, PURPOSE))
        code = code_hash(Path(__file__), discover.file(discover.FAMILIES, task.family))
        versions = torch.__version__, diffusers.__version__
        self.key = files.fingerprint(
            described, self.checkpoint, self.prompts, self.evaluator.identity, str(device), code, versions
        )

    @cached_property
    def model(self) -> Model:
        """In full precision."""
        return load_model(self.task, self.device)

    def draw(self, cell: Cell, count: int) -> None:
        """Write the record of a cell with ``count`` images, and the values of these beside it."""
        objection = _objection(cell)
        if objection:
            files.write_text(record_file(cell), _refused(self.task, cell, objection).to_json())
            return
        work, parts = self._work(cell), []
        with self._at_work(work) as network:
            for index, images in enumerate(batches(count, self.task.batch)):
                path = work.folder / unit_name(PART, index)
                if not path.exists():
                    files.write_tensors(path, self._compare(network(), images))
                parts.append(files.read_tensors(path))
        self._write(work, count, _together(parts))

    def draw_all(self, cell: Cell, references: References) -> None:
        """Write the record of a cell with all images of its task, and what its evaluator's features say of them.

        Batches that a round has drawn are taken from there; the others are drawn, and not followed along full
        precision's trajectory.
        """
        path, objection = full_record_file(cell), _objection(cell)
        if objection:
            files.write_text(path, _refused(self.task, cell, objection).to_json())
            return
        work, parts = self._work(cell), []
        with self._at_work(work) as network:
            drawn = batches(self.task.images, self.task.batch)
            for index, images in enumerate(tqdm(drawn, desc=cell.name, unit="batch", disable=None)):
                parts.append(self._seen(work, network, index, images))
            found = _together(parts)
            evidence = Evidence(Features(**{name: found[name] for name in FEATURES}), references)
            measured = {
                name: value
                for name, metric in metrics().items()
                if (value := metric.compute(evidence, _generator(name))) is not None
            }
            record = self._record(work, self.task.images, measured, found["seconds"].sum().item(), network)
        files.write_text(path, record.to_json())

    def _work(self, cell: Cell) -> Work:
        """What is known of a cell, with its folder."""
        overrides, settings, inputs = self.suite.settings(cell.task, cell.method), {}, {"checkpoint": self.checkpoint}
        entries = []
        if cell.method != FULL_PRECISION:
            settings = config_of(discover.method(cell.method), cell, overrides).described()
            inputs["calibration"] = files.sha256(files.calibration(self.task.name) / files.pool(cell.seed))
            entries = [discover.file(discover.METHODS, cell.method), discover.file(discover.BACKENDS, cell.backend)]
        key = files.fingerprint(self.key, asdict(cell), settings, inputs, code_hash(*entries) if entries else "")
        folder = FOLDER / f"{cell.name}-{key}"
        told = {"key": key} if self.task.prompts is None else {"key": key, "prompts": self.prompts}
        return Work(self.task, cell, str(self.device), folder, overrides, settings, inputs | told)

    @contextmanager
    def _at_work(self, work: Work) -> Iterator[Callable[[], Network]]:
        """Quantise a cell if it is not yet; gives what loads its network, once. No other process works on it then."""
        with files.exclusive(work.folder, work.cell.name):
            if work.quantized and not (work.folder / QUANTIZED).exists():
                do((work, QUANTIZED))
            forget_networks()
            yield cache(partial(self._network, work))

    def _network(self, work: Work) -> Network:
        if not work.quantized:
            return self.model.unet
        network = load_quantized(work.folder / QUANTIZED).to(self.device)
        return discover.backend(work.cell.backend).network(network)

    @torch.no_grad()
    def _seen(self, work: Work, network: Callable[[], Network], index: int, images: range) -> dict[str, Tensor]:
        """Features of a batch of a cell, and the seconds of each image: those of a round, or else drawn for them."""
        part, path = work.folder / unit_name(PART, index), work.folder / unit_name("features", index)
        if part.exists():
            found = files.read_tensors(part)
            return {name: found[f"features.{name}"] for name in FEATURES} | {"seconds": found["seconds"]}
        if not path.exists():
            drawn = self._full_file(images)
            if not work.quantized and drawn.exists():
                found = files.read_tensors(drawn)
            else:
                start = time.perf_counter()
                pixels = self.model.decode(self._sample(network(), images))
                found = {"images": pixels, "seconds": _each(images, time.perf_counter() - start)}
            features = extract(self.evaluator, found["images"])
            files.write_tensors(path, vars(features) | {"seconds": found["seconds"]})
        return files.read_tensors(path)

    def _full_file(self, images: range) -> Path:
        return FOLDER / f"{self.task.name}-{self.key}" / f"{images.start:08d}.safetensors"

    def _full(self, images: range) -> dict[str, Tensor]:
        """Images of full precision and their trajectory, which are drawn once."""
        path = self._full_file(images)
        if not path.exists():
            steps: list[Step] = []
            start = time.perf_counter()
            pixels = self.model.decode(self._sample(self.model.unet, images, steps))
            files.write_tensors(
                path,
                {
                    "images": pixels,
                    "seconds": _each(images, time.perf_counter() - start),
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
            "seconds": _each(images, seconds),
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
        measured = {name: mean_with_interval(each, _generator(name)) for name, each in values.items()}
        record = self._record(work, count, measured, found["seconds"].sum().item(), lambda: self._network(work))
        shown = np.zeros((0, 3, self.task.resolution, self.task.resolution), dtype=np.uint8)
        arrays = {name: each.float().numpy() for name, each in values.items()}
        path = record_file(work.cell)
        excerpt.write_to(path.with_suffix(".npz"), excerpt.Excerpt(work.inputs["key"], shown, arrays))
        files.write_text(path, record.to_json())

    def _record(
        self, work: Work, count: int, measured: Mapping[str, Value], sampled: float, network: Callable[[], Network]
    ) -> Record:
        """The record of a cell with so many images, which took ``sampled`` seconds to draw."""
        cell, cuda = work.cell, self.device.type == "cuda"
        if work.quantized:
            quantized = read(Quantized, read_metadata(work.folder / QUANTIZED)["quantized"], QUANTIZED)
        else:
            size = full_precision_bytes(network()) / MIB
            quantized = Quantized(size, size, peak_memory(self.device))
        seconds: dict[str, float] = {}
        for spent in quantized.passes:
            seconds[spent.name] = seconds.get(spent.name, 0.0) + spent.seconds
        return _record(
            dataclasses.replace(self.task, images=count, tf32=False),
            cell,
            settings=work.settings,
            evaluator=self.evaluator.identity,
            metrics=dict(measured),
            cost=Cost(
                device=torch.cuda.get_device_name(self.device) if cuda else "cpu",
                seconds=seconds | {"sample": sampled},
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


def _hash(path: Path) -> str | None:
    return manifest.sha256(path) if path.is_file() else None


def _generator(metric: str) -> torch.Generator:
    """What the interval of a metric is drawn with, as in `score`."""
    return torch.Generator().manual_seed(seed_of("score", metric))


def _each(images: range, seconds: float) -> Tensor:
    """The seconds of each image of a batch (N,)."""
    return torch.full((len(images),), seconds / len(images), dtype=torch.float64)


def _together(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _objection(cell: Cell) -> str:
    """Why a method does not apply to a cell, or an empty text."""
    if cell.method == FULL_PRECISION:
        return ""
    method = discover.method(cell.method)
    return method.lacks(cell.protocol) or method.objection(Precision.parse(cell.precision))


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
