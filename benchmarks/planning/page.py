"""What a suite will cost, as a page: a table a task, and of all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pandas as pd

from benchmarks.planning.planner import GIB, LEARNED, LEARNED_ON_GPU, QUANTIZED, Item, Rate, total
from benchmarks.report.tables.markdown import NOTHING

UNKNOWN = "?"
TERA = 10**12


def plan(planned: Mapping[str, Sequence[Item]], rates: Mapping[str, Rate], rounds: str = "") -> str:
    """A page of Markdown: what all tasks take in sum, where there are several, and a table of each.

    ``rounds`` is what it says of verdicts in rounds.
    """
    parts = [
        "# Plan",
        "Evaluations of the network are counted for one sample each. Hours are those of one device, or of one thread of"
        " a CPU, from the time that one evaluation takes, a multiplication and an addition counted as two operations: a"
        f" quantised evaluation as {QUANTIZED:g}, a row that is learned on as {LEARNED:g} of full precision, and"
        f" {LEARNED_ON_GPU:g} on a GPU. Rows of cells that begin alike are learned on once, by the first. Decoding,"
        " scoring and learning on time steps alone are not in the hours; data sets are not in the disk; memory is an"
        " estimate.",
    ]
    if len(planned) > 1:
        whole = [total(task, found) for task, found in planned.items()]
        parts.append(_overview([*whole, total("all", [item for found in planned.values() for item in found])]))
    if rounds:
        parts.append(rounds)
    for task, found in planned.items():
        parts += [f"## {task}", _table([*found, total("total", found)])]
        if task in rates:
            parts.append(_rate(rates[task]))
    return "\n\n".join(parts)


def _overview(found: Sequence[Item]) -> str:
    return _frame(
        found,
        {
            "Task": lambda item: item.name,
            "Evaluations": lambda item: _count(item.evaluations),
            "Optimiser steps": lambda item: _count(item.optimizer_steps),
            "Images": lambda item: _count(item.images),
            **LAST,
        },
    )


def _table(found: Sequence[Item]) -> str:
    columns = {
        "Step": lambda item: item.name,
        "Pool": lambda item: _count(item.calibration),
        "Quantising": lambda item: _count(item.quantising),
        "Sampling": lambda item: _count(item.sampling),
        "Reference": lambda item: _count(item.reference),
        "Optimiser steps": lambda item: _count(item.optimizer_steps),
        "Images": lambda item: _count(item.images),
        **LAST,
    }
    return _frame(found, columns)


def _frame(found: Sequence[Item], columns: Mapping[str, Callable[[Item], str]]) -> str:
    frame = pd.DataFrame({name: [show(item) for item in found] for name, show in columns.items()})
    align = ["left" if name in ("Task", "Step", "Note") else "right" for name in columns]
    return frame.to_markdown(index=False, disable_numparse=True, colalign=align)


def _rate(rate: Rate) -> str:
    operations = rate.operations / TERA
    timed = f"{rate.seconds:.3g} s on {rate.device}, {rate.rows} at once ({operations / rate.seconds:.3g} TFLOP/s)"
    text = f"An evaluation of {operations:.3g} TFLOP took {timed}."
    if rate.assumed is not None:
        text = (
            f"An evaluation of {operations:.3g} TFLOP is taken to last {rate.assumed:.3g} s"
            f" ({operations / rate.assumed:.3g} TFLOP/s); it took {timed}."
        )
    if rate.quantized == QUANTIZED and rate.learning is None:
        return text
    return f"{text} A quantised one counts as {rate.quantized:.3g}, a row that is learned on as {rate.learned:.3g}."


def _count(value: int) -> str:
    return f"{value:,}" if value else NOTHING


def _gib(value: int | None) -> str:
    return UNKNOWN if value is None else f"{value / GIB:,.2f}" if value else NOTHING


# The columns that end each table.
LAST: dict[str, Callable[[Item], str]] = {
    "Disk (GiB)": lambda item: _gib(item.disk),
    "Memory (GiB)": lambda item: _gib(item.memory),
    "Hours": lambda item: f"{item.seconds / 3600:,.2f}" if item.seconds else NOTHING,
    "Note": lambda item: item.note,
}
