"""What a suite will cost, as text: a table a task and a line that sums it up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from benchmarks.plan import GIB, LEARNED, QUANTIZED, Item, Rate, total
from benchmarks.tables.markdown import NOTHING

UNKNOWN = "?"


def plan(planned: Mapping[str, Sequence[Item]], rates: Mapping[str, Rate]) -> str:
    """The tables of some tasks with their totals, and a line on each and on all of them together."""
    parts = []
    for task, found in planned.items():
        whole = total("total", found)
        parts += [f"{task}\n\n{_table([*found, whole])}", _summary(task, whole, rates.get(task))]
    if len(planned) > 1:
        parts.append(_summary("all", total("all", [item for found in planned.values() for item in found]), None))
    parts.append(
        "Evaluations of the UNet are counted for one sample each; hours are those of one device, or of one thread of a"
        f" CPU, at the timed rate: a quantised evaluation as {QUANTIZED:g}, a row that is learned on as {LEARNED:g}"
        " evaluations of full precision. Decoding, scoring and learning on time steps alone are not in the hours; data"
        " sets are not in the disk; memory is an estimate."
    )
    return "\n\n".join(parts) + "\n"


def _table(found: Sequence[Item]) -> str:
    columns = {
        "Step": lambda item: item.name,
        "Pool": lambda item: _count(item.calibration),
        "Weights": lambda item: _count(item.weights),
        "Activations": lambda item: _count(item.activations),
        "Sampling": lambda item: _count(item.sampling),
        "Reference": lambda item: _count(item.reference),
        "Optimiser steps": lambda item: _count(item.optimizer_steps),
        "Images": lambda item: _count(item.images),
        "Disk (GiB)": lambda item: _gib(item.disk),
        "Memory (GiB)": lambda item: _gib(item.memory),
        "Hours": lambda item: f"{item.seconds / 3600:,.2f}" if item.seconds else NOTHING,
        "Note": lambda item: item.note,
    }
    frame = pd.DataFrame({name: [show(item) for item in found] for name, show in columns.items()})
    align = ["left" if name in ("Step", "Note") else "right" for name in columns]
    return frame.to_markdown(index=False, disable_numparse=True, colalign=align)


def _summary(name: str, whole: Item, rate: Rate | None) -> str:
    if not whole.evaluations:
        return f"{name}: {whole.note} {_gib(whole.disk)} GiB of disk.".replace(":  ", ": ")
    timed = ""
    if rate is not None:
        timed = f" ({rate.seconds:.3g} s an evaluation on {rate.device}, {rate.rows} at once)"
    return (
        f"{name}: {whole.evaluations:,} evaluations of the UNet, {whole.optimizer_steps:,} optimiser steps,"
        f" {whole.images:,} images, {_gib(whole.disk)} GiB of disk, {_gib(whole.memory)} GiB of memory,"
        f" {whole.seconds / 3600:,.1f} hours{timed}."
    )


def _count(value: int) -> str:
    return f"{value:,}" if value else NOTHING


def _gib(value: int | None) -> str:
    return UNKNOWN if value is None else f"{value / GIB:,.2f}" if value else NOTHING
