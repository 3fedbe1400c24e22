"""How methods rank over all tasks of a table, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest

import numpy as np

from benchmarks.metrics import Metric
from benchmarks.report.tables.comparison import QUALITY, place
from benchmarks.report.tables.markdown import NOTHING, PLACES, label, number, table
from benchmarks.suite.record import FULL_PRECISION, Record, Value
from tfmq.precision import Precision

DRAWS = 10_000
# The width of a 95 % interval in standard errors.
WIDTH = 2 * 1.96


def mean_ranks(records: Sequence[Record]) -> dict[str, dict[str, Value]]:
    """Mean rank over tasks by feature distance: precision -> method -> value, the best first.

    At each precision those methods rank among each other, from 1, that are measured on all tasks of ``records`` at seed
    0; equal values share the mean of their ranks. The interval holds the middle 95 % of the mean ranks when every
    cell's value is redrawn, from the normal distribution with the standard error of its interval, and the mean rank of
    the measured values. `n` counts tasks. Nothing is ranked over fewer than two tasks, nor fewer than two methods.
    """
    measured = [r for r in records if r.seed == 0 and r.status == "measured" and QUALITY in r.metrics]
    tasks = sorted({record.task for record in records})
    if len(tasks) < 2:
        return {}
    generator = np.random.default_rng(0)
    found = {}
    for precision in dict.fromkeys(r.precision for r in sorted(measured, key=lambda r: place(r)[1:])):
        cells = {(r.method, r.task): r.metrics[QUALITY] for r in measured if r.precision == precision}
        names = sorted({name for name, _ in cells if name != FULL_PRECISION})
        names = [name for name in names if all((name, task) in cells for task in tasks)]
        if len(names) < 2:
            continue
        total = np.zeros((1 + DRAWS, len(names)))
        for task in tasks:
            values = np.array([cells[name, task].value for name in names])
            errors = np.array([(cells[name, task].high - cells[name, task].low) / WIDTH for name in names])
            total += ranks(np.vstack([values, generator.normal(values, errors, (DRAWS, len(names)))]))
        means = total / len(tasks)
        low, high = np.percentile(means[1:], [2.5, 97.5], axis=0)
        found[precision] = {
            name: Value(value, float(min(low[index], value)), float(max(high[index], value)), len(tasks))
            for value, index, name in sorted(zip(means[0].tolist(), range(len(names)), names, strict=True))
        }
    return found


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1 within each row of values (R, M), the smallest first; equal values share the mean of their ranks."""
    own, other = values[:, :, None], values[:, None, :]
    return 1 + (other < own).sum(axis=2) + ((other == own).sum(axis=2) - 1) / 2


def across_tasks(records: Sequence[Record], metrics: Mapping[str, Metric]) -> str:
    """Markdown of `mean_ranks` beside the feature distances that they come from; empty for fewer than two tasks."""
    found = mean_ranks(records)
    if not found:
        return ""
    tasks = sorted({record.task for record in records})
    digits = metrics[QUALITY].digits
    cells = {(r.precision, r.method, r.task): r for r in records if r.seed == 0 and r.method != FULL_PRECISION}
    rows = []
    for precision, method in sorted({key[:2] for key in cells}, key=lambda row: _row_order(row, found)):
        row = {"Precision": precision, "Method": label(method)}
        row["Mean rank"] = number(found.get(precision, {}).get(method), 2, interval=True)
        for task in tasks:
            cell = cells.get((precision, method, task))
            row[task] = number(cell.metrics.get(QUALITY) if cell else None, digits, interval=False)
        if any(row[task] != NOTHING for task in tasks):
            rows.append(row)
    text = (
        "Feature distance to the full-precision image of the same noise on each task, and its mean rank over the"
        f" {len(tasks)} tasks, 1 is best, among the methods that are measured on all of them at that precision. Ranks"
        " here are by this distance since, paired, it tells methods apart where KID rarely does. Brackets are 95 %"
        f" intervals: the middle of {DRAWS:,} mean ranks, each with every cell's value redrawn from its own interval."
        " Redraws are independent, though all methods denoise the same noise, so the intervals are rather too wide; of"
        " other tasks they say nothing."
    )
    return f"{text}\n\n{table(rows)}"


def leaders(records: Sequence[Record]) -> str:
    """Markdown with the best three methods of `mean_ranks` at each precision; empty for fewer than two tasks."""
    found = mean_ranks(records)
    if not found:
        return ""
    rows = []
    for precision, values in found.items():
        best = [f"{label(method)}, {number(value, 2, interval=True)}" for method, value in values.items()]
        places = dict(zip_longest(PLACES, best[: len(PLACES)], fillvalue=NOTHING))
        rows.append({"Precision": precision} | places | {"Methods ranked": str(len(values))})
    tasks = len({record.task for record in records})
    text = (
        f"The best methods at each precision, with their mean rank over {tasks} tasks"
        " (1 is best) and its 95 % interval. Methods rank by their feature distance to the full-precision image of the"
        " same noise, among those that are measured on every task. Where intervals overlap, the order is not settled."
    )
    return f"{text}\n\n{table(rows)}"


def _row_order(row: tuple[str, str], found: Mapping[str, Mapping[str, Value]]) -> tuple[int, int, float, str]:
    precision, method = row
    bits = Precision.parse(precision)
    rank = found.get(precision, {}).get(method)
    return -bits.weight_bits, -bits.activation_bits, rank.value if rank else float("inf"), method
