"""Which records may stand in one table, how they rank there, and in which order."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.metrics import Metric
from benchmarks.report.judge import Judge
from benchmarks.report.statistic import RANKED_BY
from benchmarks.suite.discover import unknown
from benchmarks.suite.record import FULL_PRECISION, Cell, Record, Value
from tfmq.precision import Precision

# The metric whose spread over seeds tables have, and which figures show.
QUALITY = "feature_distance"

Judges = Mapping[str, Judge]


@dataclass(frozen=True)
class Standing:
    """Where a row of a table stands by the ranking statistic, over its images and calibration seeds."""

    value: Value
    rank: int


def levels(records: Sequence[Record], judges: Judges) -> dict[Cell, Value]:
    """What the rows of measured, quantised cells rank by, over all images and calibration seeds of the row."""
    found: dict[Cell, Value] = {}
    for record in records:
        if record.status != "measured" or record.method == FULL_PRECISION or record.task not in judges:
            continue
        cell = record.cell
        level = judges[cell.task].level(RANKED_BY.name, cell.row, cell.precision)
        if level is not None:
            with np.errstate(over="ignore"):  # few images and seeds bound a level by infinity
                ends = np.exp([level.value.value, level.value.low, level.value.high]).tolist()
            found[cell] = Value(*ends, level.images)
    return found


def standings(records: Sequence[Record], judges: Judges) -> dict[Cell, Standing]:
    """The standing of each measured, quantised cell of a table, within its task and precision; that of its row.

    A rank is 1 plus the number of rows that are better, with a 95 % interval of the two rows' difference that says so;
    rows that nothing decides between may share a rank. Cells with another status have none.
    """
    found = levels(records, judges)
    rows: dict[tuple[str, str], set[str]] = {}
    for record in records:
        if record.status == "measured" and record.method != FULL_PRECISION:
            rows.setdefault((record.task, record.precision), set()).add(record.cell.row)
    ranks = {}
    for cell in found:
        rivals = rows[cell.task, cell.precision] - {cell.row}
        judge = judges[cell.task]
        compared = [judge.compare(RANKED_BY.name, rival, cell.row, cell.precision) for rival in rivals]
        ranks[cell] = 1 + sum(other is not None and other.estimate.value.high < 0 for other in compared)
    return {cell: Standing(value, ranks[cell]) for cell, value in found.items()}


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


def by_task(
    records: Sequence[Record], metrics: Mapping[str, Metric], ranks: Mapping[Cell, Standing] | None = None
) -> dict[str, list[Record]]:
    """Records by task, from many bits to few; then by rank, or as they are given. Raises ValueError as `check` does."""
    check(records, metrics)
    ordered = sorted(records, key=place if ranks is None else order(ranks))
    return {task: [r for r in ordered if r.task == task] for task in dict.fromkeys(r.task for r in ordered)}


def order(ranks: Mapping[Cell, Standing]) -> Callable[[Record], tuple[object, ...]]:
    """A key to sort by: task, from many bits to few, seed, rank."""

    def key(record: Record) -> tuple[object, ...]:
        found = ranks.get(record.cell)
        by_rank = (1, 0, 0.0) if found is None else (0, found.rank, found.value.value)
        return (*place(record), record.seed, by_rank, record.method)

    return key


def place(record: Record) -> tuple[str, int, int]:
    """A key to sort by: task, from many bits to few."""
    precision = Precision.parse(record.precision)
    return record.task, -precision.weight_bits, -precision.activation_bits


def _comparable(record: Record) -> str:
    return json.dumps([record.task_version, record.settings["task"]], sort_keys=True)
