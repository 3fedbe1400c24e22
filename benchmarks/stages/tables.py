"""tables: all records become the leaderboard, the CSV and the figures, and the region of the top README."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np

from benchmarks import figures, tables
from benchmarks.metrics import metrics
from benchmarks.params import Suite
from benchmarks.record import FULL_PRECISION, Cell, Record
from benchmarks.stages import files, generate

README = Path("README.md")
GRID_COLUMNS = 10


def run(suite: Suite) -> str:
    """Write everything that is generated from records; returns the leaderboard.

    A cell without a record is shown as failed. Raises ValueError if no cell has one.
    """
    records = [_read(suite, cell) for cell in suite.cells()]
    if all(record.status == "failed" for record in records):
        raise ValueError("there are no records in results/records: run `dvc repro`")
    records = tables.gated(records, suite.gates)
    known = metrics()
    shown = []
    for task in suite.tasks.values():
        for precision in suite.precisions:
            shown += _figures(suite, task.name, precision)
    table = tables.leaderboard(records, known)
    files.write_text(files.RESULTS / "README.md", tables.report(records, known, shown))
    files.write_text(files.RESULTS / "leaderboard.csv", tables.csv(tables.frame(records, known)))
    files.write_text(README, tables.replace_region(README.read_text(encoding="utf-8"), table))
    return table


def _read(suite: Suite, cell: Cell) -> Record:
    path = files.record_file(cell)
    reason = "no record; run `dvc repro`"
    if path.is_file():
        record = Record.from_json(path.read_text(encoding="utf-8"))
        images = files.cell_folder(cell) / generate.IMAGES
        if not record.metrics or (images.is_file() and files.sha256(images) == record.inputs["images"]):
            return record
        reason = "its images are missing or newer than its record; run `dvc repro`"
    task = suite.tasks[cell.task]
    return Record(
        task=task.name,
        task_version=task.version,
        method=cell.method,
        precision=cell.precision,
        seed=cell.seed,
        protocol=suite.protocol,
        settings={"task": asdict(task), "method": {}},
        status="failed",
        reason=reason,
        metrics={},
        cost=None,
        coverage={},
        inputs={},
        environment={},
    )


def _figures(suite: Suite, task: str, precision: str) -> list[tuple[str, str]]:
    """Figures of one task at one precision: (caption, path from the results page)."""
    if not (files.cell_folder(Cell(task, FULL_PRECISION, "w32a32")) / generate.IMAGES).is_file():
        return []
    rows = {tables.label(FULL_PRECISION): _images(Cell(task, FULL_PRECISION, "w32a32"))}
    curves, timesteps = {}, None
    for method in suite.methods:
        cell = Cell(task, method, precision)
        folder = files.cell_folder(cell)
        if (folder / generate.IMAGES).is_file():
            rows[tables.label(method)] = _images(cell)
            errors = files.read_tensors(folder / generate.ERRORS)
            curves[tables.label(method)] = errors["temporal"].mean(1).numpy()
            timesteps = errors["timesteps"].numpy()
    if timesteps is None:
        return []
    columns = min(GRID_COLUMNS, *(len(images) for images in rows.values()))
    shown = []
    for kind, text, figure in (
        ("samples", f"{task} at {precision}: the same noise in each column", figures.sample_grid(rows, columns)),
        (
            "temporal",
            f"{task} at {precision}: error of the temporal features over steps",
            figures.temporal_error(curves, timesteps, f"{task}, {precision}"),
        ),
    ):
        name = f"{task}-{precision}-{kind}.png"
        files.write_bytes(files.RESULTS / "figures" / name, figures.png(figure))
        shown.append((text, f"figures/{name}"))
    return shown


def _images(cell: Cell) -> np.ndarray:
    return files.read_tensors(files.cell_folder(cell) / generate.IMAGES)["images"].numpy()
