"""How methods rank over all tasks of a table, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest

import numpy as np

from benchmarks.report.statistic import RANKED_BY
from benchmarks.report.tables.comparison import Judges, place
from benchmarks.report.tables.markdown import NOTHING, PLACES, STANDING_DIGITS, label, number, table
from benchmarks.suite.record import FULL_PRECISION, Record, Value
from tfmq.precision import Precision

DRAWS = 10_000


def mean_ranks(records: Sequence[Record], judges: Judges) -> dict[str, dict[str, Value]]:
    """Mean rank over tasks by the ranking statistic: precision -> method -> value, the best first.

    At each precision those methods rank among each other, from 1, that are measured on all tasks of ``records``; equal
    values share the mean of their ranks. The interval holds the middle 95 % of the mean ranks when the methods' values
    are redrawn, from the normal distribution with the covariance that other images, the same for all methods, and
    other calibrations, each method's own, would give them; and the mean rank of the measured values. `n` counts tasks.
    Nothing is ranked over fewer than two tasks, nor fewer than two methods.
    """
    tasks = sorted({record.task for record in records})
    if len(tasks) < 2:
        return {}
    generator = np.random.default_rng(0)
    found = {}
    for precision in dict.fromkeys(r.precision for r in sorted(records, key=lambda r: place(r)[1:])):
        rows = {r.cell.row for r in records if r.precision == precision and r.status == "measured"}
        names = [
            name for name in sorted(rows) if all(_level(judges, task, name, precision) is not None for task in tasks)
        ]
        if len(names) < 2:
            continue
        total = np.zeros((1 + DRAWS, len(names)))
        for task in tasks:
            values, covariance = judges[task].joint(RANKED_BY.name, names, precision)
            total += ranks(np.vstack([values, generator.multivariate_normal(values, covariance, DRAWS, method="eigh")]))
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


def across_tasks(records: Sequence[Record], judges: Judges) -> str:
    """Markdown of `mean_ranks` beside the values that they come from; empty for fewer than two tasks."""
    found = mean_ranks(records, judges)
    if not found:
        return ""
    tasks = sorted({record.task for record in records})
    rows = []
    of_rows = {(r.precision, r.cell.row) for r in records if r.method != FULL_PRECISION}
    for precision, method in sorted(of_rows, key=lambda row: _row_order(row, found)):
        row = {"Precision": precision, "Method": label(method)}
        row["Mean rank"] = number(found.get(precision, {}).get(method), 2, interval=True)
        for task in tasks:
            level = _level(judges, task, method, precision)
            row[task] = NOTHING if level is None else f"{np.exp(level):.{STANDING_DIGITS}f}"
        if any(row[task] != NOTHING for task in tasks):
            rows.append(row)
    text = (
        f"{RANKED_BY.label} on each task ({RANKED_BY.meaning}), and its mean rank over the {len(tasks)} tasks, 1 is"
        " best, among the methods that are measured on all of them at that precision. [RANKING.md](RANKING.md) says why"
        f" ranks are by this. Brackets are 95 % intervals: the middle of {DRAWS:,} mean ranks, each with all values"
        " redrawn as other images, the same for all methods, and other calibrations would have it; of other tasks they"
        " say nothing."
    )
    return f"{text}\n\n{table(rows)}"


def leaders(records: Sequence[Record], judges: Judges) -> str:
    """Markdown with the best three methods of `mean_ranks` at each precision; empty for fewer than two tasks."""
    found = mean_ranks(records, judges)
    if not found:
        return ""
    rows = []
    for precision, values in found.items():
        best = [f"{label(method)}, {number(value, 2, interval=True)}" for method, value in values.items()]
        places = dict(zip_longest(PLACES, best[: len(PLACES)], fillvalue=NOTHING))
        rows.append({"Precision": precision} | places | {"Methods ranked": str(len(values))})
    tasks = len({record.task for record in records})
    text = (
        f"The best methods at each precision, with their mean rank over {tasks} tasks (1 is best) and its 95 % interval"
        f" over images and calibrations. Methods rank by {RANKED_BY.meaning}, among those that are measured on every"
        " task. Where intervals overlap, the order is not settled."
    )
    return f"{text}\n\n{table(rows)}"


def _level(judges: Judges, task: str, row: str, precision: str) -> float | None:
    return judges[task].mean(RANKED_BY.name, row, precision) if task in judges else None


def _row_order(row: tuple[str, str], found: Mapping[str, Mapping[str, Value]]) -> tuple[int, int, float, str]:
    precision, method = row
    bits = Precision.parse(precision)
    rank = found.get(precision, {}).get(method)
    return -bits.weight_bits, -bits.activation_bits, rank.value if rank else float("inf"), method
