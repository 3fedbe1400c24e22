"""score: one pass of the evaluator over the images of each of a row's cells gives their records.

The values of images that a metric is the mean of are kept beside, for comparing two cells image by image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path

import torch
from safetensors import safe_open

from benchmarks import manifest
from benchmarks.clip import ClipScorer, load_clip
from benchmarks.features import Evaluator, Features, compare, extract_with_maps
from benchmarks.metrics import Evidence, metrics
from benchmarks.params import Suite, Task
from benchmarks.record import FULL_PRECISION, Cell, Cost, Record, Value
from benchmarks.stages import files, reference
from benchmarks.stages.reference import evaluator_of
from benchmarks.stages.setup import device_of, prompts_of, seed_of, task_of
from benchmarks.stages.workers import run_units

FEATURES = "features.safetensors"
MAPS = "maps.safetensors"


def run(suite: Suite, cells: Sequence[Cell], device_name: str, shards: int) -> None:
    """Write the records and the values of images of some cells, ``shards`` processes sharing them.

    A cell that its method does not apply to gets a record that says so. The full-precision cell leaves its features and
    feature maps for the cells that are paired with it. Raises an ExceptionGroup of what stopped cells, when the others
    are done.
    """
    device = device_of(device_name)
    torch.set_num_threads(1)
    for cell in cells:
        evaluator_of(task_of(suite, cell.task), device)  # before there are workers, which then have it too
    failures = run_units(cells, partial(_score, suite, device), shards, device)
    evaluator_of.cache_clear()
    _scorer.cache_clear()
    for cell, error in failures:
        error.add_note(cell.name)
    if failures:
        raise ExceptionGroup(f"{len(failures)} of {len(cells)} cells failed", [error for _, error in failures])


@lru_cache(maxsize=1)
def _scorer(folder: Path, device: torch.device) -> ClipScorer:
    return load_clip(folder, device)


def _score(suite: Suite, device: torch.device, cell: Cell) -> None:
    task = task_of(suite, cell.task)
    folder = files.cell_folder(cell)
    outcome = files.read_json(folder / files.OUTCOME)
    measured = outcome["status"] == "measured"
    evaluator = evaluator_of(task, device)
    scorer = None if task.clip is None else _scorer(Path(task.clip), device)
    values, per_image = _measure(task, cell, evaluator, scorer) if measured else ({}, {})
    record = Record(
        task=task.name,
        task_version=task.version,
        method=cell.method,
        precision=cell.precision,
        seed=cell.seed,
        protocol=cell.protocol,
        settings={
            "task": asdict(task),
            "method": outcome.get("settings", {}),
            "evaluator": evaluator.identity,
            "clip": None if scorer is None else scorer.identity,
        },
        status=outcome["status"],
        reason=outcome["reason"],
        metrics=values,
        cost=_cost(cell, outcome) if measured else None,
        coverage=_coverage(outcome.get("coverage", [])),
        details=outcome.get("details", {}),
        inputs=outcome.get("inputs", {}) | ({"images": manifest.sha256(folder / files.IMAGES)} if measured else {}),
        environment=outcome.get("environment", {}),
    )
    files.write_tensors(files.scores(cell), per_image)
    files.write_text(files.record_file(cell), record.to_json())


def _measure(
    task: Task, cell: Cell, evaluator: Evaluator, scorer: ClipScorer | None
) -> tuple[dict[str, Value], dict[str, torch.Tensor]]:
    """All metrics, and the values of images [N] of those that are a mean over images."""
    images = _images(cell)
    prompts = [] if scorer is None else prompts_of(task, "sample", range(len(images)))
    reference_features, reference_statistics, data_statistics = reference.read(task, evaluator)
    common = {
        "images": images,
        "reference_features": reference_features,
        "reference_statistics": reference_statistics,
        "data_statistics": data_statistics,
        "clip_cosines": None if scorer is None else scorer.cosines(images, prompts),
    }
    if cell.method == FULL_PRECISION:
        features, maps = extract_with_maps(evaluator, images)
        with files.new_folder(files.paired(task.name)) as folder:
            files.write_tensors(folder / FEATURES, vars(features))
            files.write_tensors(folder / MAPS, {str(index): layer for index, layer in enumerate(maps)})
        evidence = Evidence(features=features, **common)
    else:
        folder = files.paired(task.name)
        paired_features = Features(**files.read_tensors(folder / FEATURES))
        with safe_open(folder / MAPS, "pt") as file:
            features, distance = compare(evaluator, images, [file.get_slice(str(i)) for i in range(len(file.keys()))])
        errors = files.read_tensors(files.cell_folder(cell) / files.ERRORS)
        evidence = Evidence(
            features=features,
            paired=_images(files.full_precision_cell(cell)),
            paired_features=paired_features,
            perceptual_distance=distance,
            trajectory_error=errors["trajectory"],
            temporal_error=errors["temporal"],
            **common,
        )
    values, per_image = {}, {}
    for name, metric in metrics().items():
        generator = torch.Generator().manual_seed(seed_of("score", name))
        value = metric.compute(evidence, generator)
        if value is not None:
            values[name] = value
            if metric.per_image is not None:
                per_image[name] = metric.per_image(evidence)
    return values, per_image


def _images(cell: Cell) -> torch.Tensor:
    return files.read_tensors(files.cell_folder(cell) / files.IMAGES)["images"]


def _cost(cell: Cell, outcome: dict) -> Cost:
    pool = files.read_json(files.calibration(cell.task) / files.COST)
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
