"""What `dvc metrics` and `dvc plots` show: a file of numbers for each row of each table, and series to draw.

All of it is of seed 0. `definitions` says in dvc.yaml how the series are drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

import numpy as np
import pandas as pd

from benchmarks.report.tables import QUALITY, csv
from benchmarks.suite.params import Suite
from benchmarks.suite.record import Record

LEADERBOARD = "leaderboard"
# Of curves, which are many, those at one precision are drawn.
PRECISION = "w4a8"


def metrics(suite: Suite, measured: Mapping[str, Sequence[Record]]) -> dict[str, dict[str, dict[str, float]]]:
    """``table/method`` -> metric -> precision -> its mean over the table's tasks, where all of them are measured."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, records in measured.items():
        table = suite.tables[name]
        for method in table.methods:
            for precision in table.precisions:
                values = [
                    record.metrics[QUALITY].value
                    for record in records
                    if record.method == method and record.precision == precision and record.seed == 0
                    if QUALITY in record.metrics
                ]
                if len(values) == len(table.tasks):
                    row = found.setdefault(f"{name}/{method}", {QUALITY: {}})
                    row[QUALITY][precision] = mean(values)
    return found


def bars(rows: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, str]:
    """A CSV for each precision of the leaderboard, from `metrics`: a line a method."""
    found: dict[str, list[dict[str, object]]] = {}
    for path, metric in rows.items():
        table, _, method = path.partition("/")
        for precision, value in metric[QUALITY].items() if table == LEADERBOARD else ():
            found.setdefault(f"{LEADERBOARD}-{precision}.csv", []).append({"method": method, QUALITY: value})
    return {name: csv(pd.DataFrame(lines)) for name, lines in found.items()}


def errors(task: str, timesteps: np.ndarray, curves: Mapping[str, np.ndarray]) -> dict[str, str]:
    """A CSV of the temporal error of a task's rows, a line a time step, a column a method."""
    frame = pd.DataFrame({"timestep": timesteps, **curves})
    return {f"{task}-temporal-error.csv": csv(frame.drop_duplicates("timestep"))}


def deviations(found: Mapping, methods: Sequence[str]) -> dict[str, str]:
    """A CSV of the median deviation in a file of ``results/temporal``, a line an evaluation, a column a method."""
    rows = {row["method"]: row for row in found["rows"] if row["precision"] == PRECISION}
    curves = {name: rows[name]["deviation"]["median"] for name in methods if "deviation" in rows.get(name, {})}
    frame = pd.DataFrame(curves, columns=list(methods))
    frame.insert(0, "evaluation", range(1, len(frame) + 1))
    return {f"{found['task']}-deviation.csv": csv(frame)}


def definitions(suite: Suite, folder: Path) -> list[dict[str, dict[str, object]]]:
    """The ``plots`` of dvc.yaml, of the series in ``folder``."""
    if LEADERBOARD not in suite.tables:
        return []
    table, looked_at = suite.tables[LEADERBOARD], suite.temporal
    found: list[dict[str, dict[str, object]]] = [
        {
            f"Feature distance to full precision, {precision}": {
                "template": "bar_horizontal_sorted",
                "x": QUALITY,
                "y": {f"{folder.as_posix()}/{LEADERBOARD}-{precision}.csv": "method"},
                "x_label": "mean over tasks, lower is better",
                "y_label": "method",
            }
        }
        for precision in table.precisions
    ]

    def curves(title: str, name: str, task: str, x: str, labels: tuple[str, str]) -> dict[str, dict[str, object]]:
        series = {f"{folder.as_posix()}/{task}-{name}.csv": list(table.methods)}
        return {f"{title}, {task}, {PRECISION}": {"x": x, "y": series, "x_label": labels[0], "y_label": labels[1]}}

    if PRECISION in table.precisions:
        labels = "time step", "1 - cosine to full precision"
        found += [curves("Temporal error", "temporal-error", task, "timestep", labels) for task in table.tasks]
    if looked_at is not None and PRECISION in looked_at.precisions:
        labels = "evaluations done", "deviation of the latents, relative"
        found += [
            curves("Deviation by temporal features", "deviation", t, "evaluation", labels) for t in looked_at.tasks
        ]
    return found
