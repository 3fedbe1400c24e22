"""All numbers of all cells as one data frame, and as CSV."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import pandas as pd

from benchmarks.metrics import Metric
from benchmarks.report.statistic import RANKED_BY
from benchmarks.report.tables.comparison import Judges, Standing, check, order, standings
from benchmarks.suite.record import Record, Value

STATUS_KEYS = ("task", "task_version", "method", "precision", "seed", "protocol", "backend", "status", "reason")


def frame(tables: Mapping[str, Sequence[Record]], metrics: Mapping[str, Metric], judges: Judges) -> pd.DataFrame:
    """One row a cell: what it is, every metric with `_low`, `_high` and `_n`, and its cost.

    Before the metrics stand its row's rank in its table, and the statistic that this is by, with the same ends.

    ``tables`` holds the records that each table measures. Rows are table by table, by task, from many bits to few, by
    seed, by rank. What was not measured is missing. Raises ValueError for records that must not be compared: a cell
    twice, or one task under different settings; and for metrics that no file describes.
    """
    if not any(tables.values()):
        return pd.DataFrame(columns=["table", *STATUS_KEYS, "rank"])
    check([record for records in tables.values() for record in records], metrics)
    rows = []
    for name, records in tables.items():
        ranks = standings(records, judges)
        ordered = sorted(records, key=order(ranks))
        rows += [{"table": name} | _row(record, metrics, ranks.get(record.cell)) for record in ordered]
    table = pd.DataFrame(rows)
    whole = [column for column in table if column == "rank" or column.endswith("_n")]
    return table.astype(dict.fromkeys(whole, "Int64"))


def csv(table: pd.DataFrame) -> str:
    """The frame as CSV with eight significant digits; `pandas.read_csv` reads it back."""
    return table.to_csv(index=False, float_format="%.8g", lineterminator="\n")


def _row(record: Record, metrics: Mapping[str, Metric], standing: Standing | None) -> dict[str, object]:
    row: dict[str, object] = {key: getattr(record, key) for key in STATUS_KEYS}
    row["rank"] = None if standing is None else standing.rank
    values = {RANKED_BY.name: None if standing is None else standing.value}
    values |= {name: record.metrics.get(name) for name in metrics}
    for name, value in values.items():
        for field in dataclasses.fields(Value):
            column = name if field.name == "value" else f"{name}_{field.name}"
            row[column] = getattr(value, field.name) if value else None
    if record.cost is not None:
        cost = dataclasses.asdict(record.cost)
        row |= {f"seconds_{phase.replace(' ', '_')}": seconds for phase, seconds in cost.pop("seconds").items()}
        row |= {"quantization_seconds": record.cost.quantization_seconds} | cost
    return row
