"""Which records may stand in one table, how they rank there, and in which order."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from benchmarks.metrics import Metric
from benchmarks.suite.discover import unknown
from benchmarks.suite.record import FULL_PRECISION, Record, Value
from tfmq.precision import Precision

# Ranks within a table are by the first; the second, a mean over pairs of images, separates methods further.
RANKED_BY, QUALITY = "kid_fp", "feature_distance"


def ranking(records: Sequence[Record]) -> dict[str, int]:
    """Rank of each measured, quantised cell of a table by KID to full precision, within its task, precision and seed.

    A rank is 1 plus the number of cells whose 95 % interval lies entirely below (so cells that overlap may share a
    rank). Cells with another status, or without that metric, have none.
    """
    ranks = {}
    ranked = [r for r in records if r.status == "measured" and r.method != FULL_PRECISION and RANKED_BY in r.metrics]
    for record in ranked:
        low = record.metrics[RANKED_BY].low
        group = [r for r in ranked if (r.task, r.precision, r.seed) == (record.task, record.precision, record.seed)]
        ranks[record.cell.name] = 1 + sum(rival.metrics[RANKED_BY].high < low for rival in group)
    return ranks


def difference(values: np.ndarray, others: np.ndarray) -> Value:
    """Mean over images (N,) of ``values - others``, with 1.96 standard errors to each side."""
    pairs = values - others
    margin = 1.96 * pairs.std(ddof=1) / len(pairs) ** 0.5
    middle = pairs.mean()
    return Value(float(middle), float(middle - margin), float(middle + margin), len(pairs))


def gated(records: Sequence[Record], gates: Mapping[str, Mapping[str, tuple[float, ...]]]) -> list[Record]:
    """The records, those of a task as unverified if its full-precision row misses a bound of its gate.

    ``gates`` maps a task to its metrics' bounds (low, high). A wrong full-precision number means that checkpoint,
    sampler or evaluator are not what the task says, and then no quantised number of it means anything either.
    """
    broken = {}
    for record in records:
        if record.method == FULL_PRECISION and record.status == "measured":
            for name, (low, high) in gates.get(record.task, {}).items():
                if name not in record.metrics:
                    raise unknown(f"metric in gates.{record.task}", name, record.metrics, "Gates bound metrics.")
                value = record.metrics[name].value
                if not low <= value <= high:
                    broken[record.task] = f"full precision has {name} {value:.4g}, expected {low:g} to {high:g}"
    return [
        dataclasses.replace(record, status="unverified", reason=broken[record.task])
        if record.task in broken and record.status == "measured"
        else record
        for record in records
    ]


def check(records: Sequence[Record], metrics: Mapping[str, Metric]) -> None:
    """Raise ValueError for records that must not be compared, and for metrics that no file describes.

    Those are no records, a cell twice, and one task under different settings.
    """
    if not records:
        raise ValueError("there are no records: score at least one cell first")
    first: dict[str, Record] = {}
    seen = set()
    for record in records:
        if record.cell in seen:
            raise ValueError(f"cell {record.cell.name} is there twice: keep one record")
        seen.add(record.cell)
        known = first.setdefault(record.task, record)
        if _comparable(record) != _comparable(known):
            raise ValueError(
                f"{record.cell.name} and {known.cell.name} were made under different settings of {record.task}:"
                " run `dvc repro` so that one table has one setting"
            )
        for name in record.metrics:
            if name not in metrics:
                raise unknown(f"metric in {record.cell.name}", name, metrics, "Score the cell again.")


def by_task(records: Sequence[Record], metrics: Mapping[str, Metric], ranked: bool) -> dict[str, list[Record]]:
    """Records by task, from many bits to few; then by rank, or as they are given. Raises ValueError as `check` does."""
    check(records, metrics)
    ordered = sorted(records, key=order(ranking(records)) if ranked else place)
    return {task: [r for r in ordered if r.task == task] for task in dict.fromkeys(r.task for r in ordered)}


def order(ranks: Mapping[str, int]) -> Callable[[Record], tuple[object, ...]]:
    """A key to sort by: task, from many bits to few, seed, rank."""

    def key(record: Record) -> tuple[object, ...]:
        rank = ranks.get(record.cell.name)
        value = record.metrics.get(RANKED_BY)
        return (
            *place(record),
            record.seed,
            (rank is None, rank or 0),
            (value is None, value.value if value else 0.0),
            record.method,
        )

    return key


def place(record: Record) -> tuple[str, int, int]:
    """A key to sort by: task, from many bits to few."""
    precision = Precision.parse(record.precision)
    return record.task, -precision.weight_bits, -precision.activation_bits


def _comparable(record: Record) -> str:
    return json.dumps([record.task_version, record.settings["task"]], sort_keys=True)
