"""rounds: draw a task's cells in rounds until their claims are decided, and say which are.

Verdicts take fewer images than a Frechet distance does. A cell is quantised once; of its images only the values that
rows are judged by are kept, in `results/rounds`, beside a record that says what they come from. Full precision is drawn
once, with its trajectory, and every cell is compared with it. What is finished is kept in `work/rounds`, batch by
batch, and a run that was stopped goes on. `generate` and `score` draw all images of a cell, which is what the papers'
FIDs take; they learn no rounding again that is learned here.
"""

from __future__ import annotations

import json
from dataclasses import asdict

import torch
from tqdm.auto import tqdm

from benchmarks.metrics import metrics
from benchmarks.report import rounds as report
from benchmarks.report.statistic import Values
from benchmarks.runtime import excerpt, files
from benchmarks.runtime.devices import device_of
from benchmarks.stages._rounds import Bench, record_file
from benchmarks.stages._setup import task_of
from benchmarks.stages._units import config_of
from benchmarks.suite import discover
from benchmarks.suite.params import Suite
from benchmarks.suite.record import FULL_PRECISION, Cell, Record


def run(suite: Suite, task_name: str, device_name: str, draw: bool = False) -> str:
    """What is decided of a task, and which cells go on, with how many images; these are drawn if ``draw`` says so.

    Raises ValueError for a task without rounds in params.yaml, and for calibration pools, checkpoints or evaluators
    that are missing.
    """
    task = task_of(suite, task_name)
    if suite.rounds is None or task.name not in suite.rounds.images:
        known = ", ".join(suite.rounds.images) if suite.rounds else "none"
        raise ValueError(f"{task.name} is none of the tasks under `rounds.images` of params.yaml, which are {known}")
    records, values = _found(suite, task.name)
    decision = report.decide(suite, task.name, list(records.values()), values, metrics())
    if draw:
        bench = Bench(suite, task, device_of(device_name))
        torch.set_num_threads(1)
        while decision.next:
            for cell, images in tqdm(decision.next.items(), desc=task.name, unit="cell"):
                if cell.method != FULL_PRECISION:
                    bench.draw(cell, images)
            records, values = _found(suite, task.name)
            decision = report.decide(suite, task.name, list(records.values()), values, metrics())
    return report.page(task.name, decision, suite.rounds)


def _found(suite: Suite, task: str) -> tuple[dict[Cell, Record], dict[Cell, Values]]:
    """Records of a task's cells, and what their images have: those of rounds, else those of `score`.

    A record of other settings is none.
    """
    records, values = {}, {}
    for cell in suite.cells():
        if cell.task != task or cell.method == FULL_PRECISION:
            continue
        for path in (record_file(cell), files.record_file(cell)):
            if path.is_file() and _is_of(suite, record := Record.load(path)):
                records[cell] = record
                if record.metrics:
                    values[cell] = excerpt.read_from(path.with_suffix(".npz")).values
                break
    return records, values


def _is_of(suite: Suite, record: Record) -> bool:
    """Whether a record is of the present settings of its task's version and its method."""
    overrides = suite.settings(record.task, record.method)
    config = asdict(config_of(discover.method(record.method), record.cell, overrides))
    same = record.settings["method"] in ({}, json.loads(json.dumps(config)))
    return same and record.task_version == suite.tasks[record.task].version
