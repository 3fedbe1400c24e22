"""rounds: draw a task's cells in rounds until their claims are decided, and say which are.

Verdicts take fewer images than a Frechet distance does. A cell is quantised once; of its images only the values that
rows are judged by are kept, in `results/rounds`, beside a record that says what they come from. Full precision is drawn
once, with its trajectory, and every cell is compared with it. What is finished is kept in `work/rounds`, batch by
batch, and a run that was stopped goes on. A record that was made from another checkpoint, evaluator, calibration pool
or other prompts than those that are there is none, and its cell is drawn anew. `generate` and `score` draw all images
of a cell, which is what the papers' FIDs take; they learn no rounding again that is learned here. Of single cells all
images are drawn here too, by name, on top of those of the rounds: then `results/full` has their distances.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tqdm.auto import tqdm

from benchmarks.metrics import metrics
from benchmarks.report import rounds as report
from benchmarks.runtime.devices import device_of
from benchmarks.stages import _drawn, reference
from benchmarks.stages._rounds import Bench, Sources
from benchmarks.stages._setup import task_of
from benchmarks.suite import discover
from benchmarks.suite.params import Suite
from benchmarks.suite.record import FULL_PRECISION, Cell
from benchmarks.suite.tasks import Task


def run(suite: Suite, task_name: str, device_name: str, draw: bool = False, full: Sequence[str] = ()) -> str:
    """What is decided of a task, and which cells go on, with how many images; these are drawn if ``draw`` says so.

    Of the cells named in ``full``, such as ``tfmq/w4a8``, all images are drawn then, and what their features say is
    told too. Raises ValueError for a task without rounds in params.yaml, cells that it does not have, and for
    calibration pools, checkpoints, evaluators or references that are missing.
    """
    task = task_of(suite, task_name)
    if suite.rounds is None or task.name not in suite.rounds.images:
        known = ", ".join(suite.rounds.images) if suite.rounds else "none"
        raise ValueError(f"{task.name} is none of the tasks under `rounds.images` of params.yaml, which are {known}")
    chosen, device = _named(suite, task.name, full), device_of(device_name)
    decision = _decide(suite, task, device)
    if draw or chosen:
        bench = Bench(suite, task, device)
        torch.set_num_threads(1)
        references = reference.read(task, bench.evaluator) if chosen else None
        while draw and decision.next:
            for cell, images in tqdm(decision.next.items(), desc=task.name, unit="cell"):
                if cell.method != FULL_PRECISION:
                    bench.draw(cell, images)
            decision = _decide(suite, task, device)
        for cell in chosen:
            bench.draw_all(cell, references)
    text = report.page(task.name, decision, suite.rounds)
    if not chosen:
        return text
    records = _drawn.in_full(suite)
    return f"{text}\n\n{report.full_counts([records[cell] for cell in chosen], metrics())}"


def _named(suite: Suite, task: str, names: Sequence[str]) -> list[Cell]:
    """The cells of a task by their names without it."""
    cells = {cell.name.removeprefix(f"{task}/"): cell for cell in suite.cells() if cell.task == task}
    for name in names:
        if name not in cells:
            raise discover.unknown(f"cell of {task}", name, cells, "Name a row and a precision, such as tfmq/w4a8.")
    return [cells[name] for name in dict.fromkeys(names)]


def _decide(suite: Suite, task: Task, device: torch.device) -> report.Decision:
    # What is there is looked at anew each time: drawing takes days, in which a pool may be made again.
    records, values = _drawn.in_rounds(suite, task.name, Sources(task, device).made)
    return report.decide(suite, task.name, list(records.values()), values, metrics())
