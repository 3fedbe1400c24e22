"""score: one pass of the evaluator over a cell's images gives its record."""

from __future__ import annotations

from dataclasses import asdict

import torch

from benchmarks import manifest
from benchmarks.features import Evaluator, compare, extract
from benchmarks.metrics import Evidence, metrics
from benchmarks.params import Suite, Task
from benchmarks.record import FULL_PRECISION, Cell, Cost, Record, Value
from benchmarks.stages import calibrate, files, generate, reference
from benchmarks.stages.setup import device_of, seed_of, task_of


def run(suite: Suite, cell: Cell, device_name: str) -> None:
    """Write the record of a cell. A cell that its method does not apply to gets a record that says so."""
    task = task_of(suite, cell.task)
    folder = files.cell_folder(cell)
    outcome = files.read_json(folder / generate.OUTCOME)
    torch.set_num_threads(suite.threads)
    measured = outcome["status"] == "measured"
    evaluator = reference.evaluator_of(task, device_of(device_name))
    record = Record(
        task=task.name,
        task_version=task.version,
        method=cell.method,
        precision=cell.precision,
        seed=cell.seed,
        protocol=suite.protocol,
        settings={"task": asdict(task), "method": outcome.get("settings", {}), "evaluator": evaluator.identity},
        status=outcome["status"],
        reason=outcome["reason"],
        metrics=_measure(task, cell, evaluator) if measured else {},
        cost=_cost(cell, outcome) if measured else None,
        coverage=_coverage(outcome.get("coverage", [])),
        inputs=outcome.get("inputs", {}) | ({"images": manifest.sha256(folder / generate.IMAGES)} if measured else {}),
        environment=outcome.get("environment", {}),
    )
    files.write_text(files.record_file(cell), record.to_json())


def _measure(task: Task, cell: Cell, evaluator: Evaluator) -> dict[str, Value]:
    images = _images(cell)
    reference_features, reference_statistics, data_statistics = reference.read(task, evaluator)
    common = {
        "images": images,
        "reference_features": reference_features,
        "reference_statistics": reference_statistics,
        "data_statistics": data_statistics,
    }
    if cell.method == FULL_PRECISION:
        evidence = Evidence(features=extract(evaluator, images), **common)
    else:
        paired = _images(files.full_precision_cell(cell))
        features, paired_features, distance = compare(evaluator, images, paired)
        errors = files.read_tensors(files.cell_folder(cell) / generate.ERRORS)
        evidence = Evidence(
            features=features,
            paired=paired,
            paired_features=paired_features,
            perceptual_distance=distance,
            trajectory_error=errors["trajectory"],
            temporal_error=errors["temporal"],
            **common,
        )
    values = {}
    for name, metric in metrics().items():
        generator = torch.Generator().manual_seed(seed_of("score", name))
        value = metric.compute(evidence, generator)
        if value is not None:
            values[name] = value
    return values


def _images(cell: Cell) -> torch.Tensor:
    return files.read_tensors(files.cell_folder(cell) / generate.IMAGES)["images"]


def _cost(cell: Cell, outcome: dict) -> Cost:
    pool = files.read_json(files.calibration(cell.task) / calibrate.COST)
    quantized = cell.method != FULL_PRECISION
    effort = outcome.get("effort", {"unet_evaluations": 0, "optimizer_steps": 0})
    seconds = {"calibrate": pool["seconds"] if quantized else 0.0, **outcome.get("seconds", {})}
    return Cost(
        device=outcome["device"],
        seconds=seconds | {"sample": outcome["sample_seconds"]},
        peak_memory_mib=outcome["peak_memory_mib"],
        unet_evaluations=effort["unet_evaluations"] + (pool["unet_evaluations"] if quantized else 0),
        optimizer_steps=effort["optimizer_steps"],
        size_mib=outcome["size_mib"],
        full_precision_size_mib=outcome["full_precision_size_mib"],
    )


def _coverage(rows: list[dict]) -> dict[str, object]:
    """How many layers have which bits, and every layer that is not wholly quantised with the reason."""
    counts: dict[str, int] = {}
    for row in rows:
        key = f"{row['kind']} w{row['weight_bits']}a{row['activation_bits']}"
        counts[key] = counts.get(key, 0) + 1
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row["reason"]:
            reasons.setdefault(row["reason"], []).append(f"{row['path']} ({row['kind']})")
    return {"layers": counts, "not_quantized": reasons}
