"""What cells that were drawn in rounds have, and those of which `rounds` has drawn all images."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from benchmarks.report.statistic import Values
from benchmarks.runtime import excerpt, files
from benchmarks.suite import discover
from benchmarks.suite.fields import read
from benchmarks.suite.params import Suite
from benchmarks.suite.record import FULL_PRECISION, Cell, Record


def record_file(cell: Cell) -> Path:
    """The record of a cell that was drawn in rounds; the values of its images lie beside it."""
    return files.RESULTS / "rounds" / f"{cell.name}.json"


def full_record_file(cell: Cell) -> Path:
    """The record of a cell of which `rounds --full` has drawn all images."""
    return files.RESULTS / "full" / f"{cell.name}.json"


def in_rounds(
    suite: Suite, task: str, taken: Callable[[Record], bool] = lambda record: True
) -> tuple[dict[Cell, Record], dict[Cell, Values]]:
    """Records of a task's cells, and what their images have: those of rounds, else those of `score`.

    A record of other settings is none, and so is one that is not ``taken``.
    """
    records, values = {}, {}
    for cell in suite.cells():
        if cell.task != task or cell.method == FULL_PRECISION:
            continue
        for path in (record_file(cell), files.record_file(cell)):
            if path.is_file() and _is_of(suite, record := Record.load(path)) and taken(record):
                records[cell] = record
                if record.metrics:
                    values[cell] = excerpt.read_from(path.with_suffix(".npz")).values
                break
    return records, values


def in_full(suite: Suite) -> dict[Cell, Record]:
    """The records of the cells of which `rounds --full` has drawn all images, of the present settings."""
    found = {cell: full_record_file(cell) for cell in suite.cells()}
    records = {cell: Record.load(path) for cell, path in found.items() if path.is_file()}
    return {
        cell: record
        for cell, record in records.items()
        if _is_of(suite, record) and record.settings["task"]["images"] == suite.tasks[cell.task].images
    }


def _is_of(suite: Suite, record: Record) -> bool:
    """Whether a record is of the present settings of its task's version and its method."""
    settings = {}
    if record.method != FULL_PRECISION:
        overrides = suite.settings(record.task, record.method)
        config = read(discover.method(record.method).config, overrides, f"methods.{record.method}")
        settings = json.loads(json.dumps(config.described()))
    return record.settings["method"] in ({}, settings) and record.task_version == suite.tasks[record.task].version
