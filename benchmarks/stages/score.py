"""score: evaluators extract features of the images of each of a row's cells, and its metrics are written as a record.

The work is a queue of units, for one process or many: parts of a cell's images, and, when features of all parts are
there, its record. Beside it goes an excerpt: the per-image values behind a metric that is a mean, for comparing two
cells image by image, and what figures show.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.features import extract
from benchmarks.metrics import Evidence, feature_distance, metrics
from benchmarks.metrics._interval import mean_with_interval
from benchmarks.runtime import excerpt, files
from benchmarks.runtime.devices import device_of
from benchmarks.runtime.excerpt import Excerpt
from benchmarks.runtime.images import TENSOR
from benchmarks.runtime.workers import run_units
from benchmarks.stages import _evidence, reference
from benchmarks.stages._setup import seed_of, task_of
from benchmarks.suite.fields import read
from benchmarks.suite.outcome import Layer, Made, Outcome, TensorFloat32
from benchmarks.suite.params import Suite
from benchmarks.suite.record import FULL_PRECISION, Cell, Cost, Record, Value
from benchmarks.suite.tasks import Task

# In the folder of the features of full precision: the evaluators and CLIPs that they come from.
SEEN_BY = "seen_by.json"
# A part of a cell's images, or None for the cell's record.
Unit = tuple[Cell, range | None]


def run(suite: Suite, cells: Sequence[Cell], device_name: str, shards: int) -> None:
    """Write the records of some cells, and the excerpts beside them, ``shards`` processes sharing the work.

    A cell that its method does not apply to gets a record that says so. The full-precision cell leaves its features for
    the cells that are paired with it. Raises an ExceptionGroup of what stopped cells, when the others are done.
    """
    device = device_of(device_name)
    if device.type == "cpu":  # beside a GPU, one process has all cores for its metrics
        torch.set_num_threads(1)
    units: list[Unit] = []
    left: dict[Cell, int] = {}
    for cell in cells:
        task = task_of(suite, cell.task)
        _evidence.evaluators(task, device)  # before there are workers, which then have them too
        parts = _evidence.parts(task) if (files.cell_folder(cell) / files.IMAGES).exists() else []
        left[cell] = len(parts)
        units += [(cell, part) for part in parts or [None]]

    def then(unit: Unit) -> list[Unit]:
        cell, part = unit
        left[cell] -= 1
        return [(cell, None)] if part is not None and left[cell] == 0 else []

    files.WORK.mkdir(exist_ok=True)
    with TemporaryDirectory(prefix=".score-", dir=files.WORK) as folder:
        failures = run_units(units, partial(_do, suite, device, Path(folder)), shards, device, then)
    _evidence.release()
    failed = {cell: error for (cell, _), error in reversed(failures)}
    for cell, error in failed.items():
        error.add_note(cell.name)
    if failed:
        raise ExceptionGroup(f"{len(failed)} of {len(cells)} cells failed", list(failed.values()))


def _do(suite: Suite, device: torch.device, folder: Path, unit: Unit) -> None:
    cell, part = unit
    task = task_of(suite, cell.task)
    if part is None:
        _score(task, cell, device, folder / cell.name)
    else:
        _evidence.extract_part(task, cell, device, folder / cell.name, part)


def _score(task: Task, cell: Cell, device: torch.device, extracted: Path) -> None:
    """Write the record of a cell, with the metrics of its images."""
    folder = files.cell_folder(cell)
    outcome = read(Outcome, files.read_json(folder / files.OUTCOME), str(folder / files.OUTCOME))
    made, found = outcome.made, {} if outcome.made is None else {"images": outcome.made.images}
    made_with = files.read_json(files.reference(task.name) / reference.EVALUATOR)
    values, per_image = ({}, {}) if made is None else _measure(task, cell, device, extracted)
    record = Record(
        task=task.name,
        task_version=task.version,
        method=cell.method,
        precision=cell.precision,
        seed=cell.seed,
        protocol=cell.protocol,
        backend=cell.backend,
        settings={
            "task": task.described(),
            "method": outcome.settings,
            **_evidence.identities(task, device),
            "reference": {key: made_with[key] for key in ("data", "features", "clip") if key in made_with},
        },
        status=outcome.status,
        reason=outcome.reason,
        metrics=values,
        cost=None if made is None else _cost(cell, made),
        coverage=_coverage(() if made is None else made.quantized.coverage),
        details={} if made is None else _details(task, cell, device, made),
        inputs=outcome.inputs | found,
        environment={} if made is None else made.environment,
    )
    if made is None:
        excerpt.path_of(cell).unlink(missing_ok=True)
    else:
        excerpt.write(cell, _excerpt(cell, made, per_image))
    files.write_text(files.record_file(cell), record.to_json())


def _measure(
    task: Task, cell: Cell, device: torch.device, extracted: Path
) -> tuple[dict[str, Value], dict[str, torch.Tensor]]:
    """All metrics, and the values of images (N,) of those that are a mean over images."""
    features, found = _evidence.read_parts(extracted)
    if "clip_cosines" in found:
        found["clip_cosines"] = found["clip_cosines"].T
    paired = {}
    if cell.method == FULL_PRECISION:
        with files.new_folder(files.paired(task.name)) as folder:
            for path in extracted.iterdir():
                path.rename(folder / path.name)
            # A change of evaluators or CLIPs shows here, in what all other cells of the task are compared with.
            files.write_json(folder / SEEN_BY, _evidence.identities(task, device))
    else:
        errors = files.read_tensors(files.cell_folder(cell) / files.ERRORS)
        paired["paired_features"] = _evidence.read_parts(files.paired(task.name))[0]
        paired |= {"trajectory_error": errors["trajectory"], "temporal_error": errors["temporal"]}
    references = reference.read(task, *_evidence.evaluators(task, device))
    evidence = Evidence(features=features, references=references, **found, **paired)
    values, per_image = {}, {}
    for name, metric in metrics().items():
        generator = torch.Generator().manual_seed(seed_of("score", name))
        value = metric.compute(evidence, generator)
        if value is not None:
            values[name] = value
            if metric.per_image is not None:
                per_image[name] = metric.per_image(evidence)
    return values, per_image


def _details(task: Task, cell: Cell, device: torch.device, made: Made) -> dict[str, object]:
    """What is told of quantising; of full precision in TF32, how far features are from those in float32."""
    path = files.cell_folder(cell) / files.FLOAT32
    if not path.exists():
        return made.quantized.details
    evaluator, _ = _evidence.evaluators(task, device)
    exact = extract(evaluator, files.read_tensors(path)[TENSOR])
    own, _ = _evidence.read_parts(files.paired(task.name))
    distances = feature_distance.distances(own.pooled[: len(exact)], exact.pooled)
    generator = torch.Generator().manual_seed(seed_of("score", "tf32"))
    found = read(TensorFloat32, made.quantized.details["tf32"], "tf32")
    found = replace(found, feature_distance=mean_with_interval(distances, generator))
    return made.quantized.details | {"tf32": asdict(found)}


def _excerpt(cell: Cell, made: Made, per_image: dict[str, torch.Tensor]) -> Excerpt:
    images = files.read_images(cell).first(excerpt.SHOWN).numpy()
    values = {name: tensor.numpy() for name, tensor in per_image.items()}
    if cell.method == FULL_PRECISION:
        return Excerpt(made.images, images, values)
    errors = files.read_tensors(files.cell_folder(cell) / files.ERRORS)
    return Excerpt(made.images, images, values, errors["temporal"].mean(1).numpy(), errors["timesteps"].numpy())


def _cost(cell: Cell, made: Made) -> Cost:
    pool = {"seconds": 0.0, "unet_evaluations": 0}
    if cell.method != FULL_PRECISION:
        pool = files.read_json(files.calibration(cell.task) / files.COST)
    quantized = made.quantized
    seconds = {"calibrate": pool["seconds"]}
    for spent in quantized.passes:
        seconds[spent.name] = seconds.get(spent.name, 0.0) + spent.seconds
    evaluations = sum(spent.unet_evaluations for spent in quantized.passes)
    return Cost(
        device=made.device,
        seconds=seconds | {"sample": made.sample_seconds},
        peak_memory_mib=quantized.peak_memory_mib,
        unet_evaluations=evaluations + pool["unet_evaluations"],
        optimizer_steps=sum(spent.optimizer_steps for spent in quantized.passes),
        size_mib=quantized.size_mib,
        full_precision_size_mib=quantized.full_precision_size_mib,
        execution=cell.backend,
    )


def _coverage(layers: Sequence[Layer]) -> dict[str, object]:
    """How many layers have which bits, and every layer that is not wholly quantised with the reason."""
    counts: dict[str, int] = {}
    reasons: dict[str, list[str]] = {}
    for layer in layers:
        key = f"{layer.kind} w{layer.weight_bits}a{layer.activation_bits}"
        counts[key] = counts.get(key, 0) + 1
        if layer.reason:
            reasons.setdefault(layer.reason, []).append(f"{layer.path} ({layer.kind})")
    return {"layers": counts, "not_quantized": reasons}
