"""One function a table: its records as Markdown, task by task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.metrics import Metric
from benchmarks.report.statistic import RANKED_BY
from benchmarks.report.tables.comparison import Judges, by_task, difference, standings
from benchmarks.report.tables.markdown import (
    NOTHING,
    caption,
    cells_table,
    heading,
    label,
    measured,
    note,
    number,
    table,
)
from benchmarks.report.tables.summary import across_tasks
from benchmarks.suite import discover
from benchmarks.suite.record import SHARED, SIMULATED, Cell, Record, Value
from tfmq.precision import FULL

# The columns of each table; the full one has every metric.
LEADERBOARD = ("kid_fp", "feature_distance", "fd_data", "clip_score", "temporal_error")
ABLATION = ("kid_fp", "feature_distance", "psnr", "clip_score", "noise_error", "temporal_error")
PUBLISHED = ("kid_fp", "feature_distance")
DEPLOYED = ("feature_distance", "noise_error")


def leaderboard(records: Sequence[Record], metrics: Mapping[str, Metric], judges: Judges) -> str:
    """Markdown with the mean ranks over tasks, and for each task a caption and the headline columns, by rank."""
    parts = _ranked(records, metrics, judges)
    summary = across_tasks(records, judges)
    return "\n\n".join([f"### Across tasks\n\n{summary}", *parts] if summary else parts) + "\n"


def newer(records: Sequence[Record], metrics: Mapping[str, Metric], judges: Judges) -> str:
    """Markdown of other papers' rows, ranked among those beside; as of `leaderboard`, but no means over tasks."""
    return "\n\n".join(_ranked(records, metrics, judges)) + "\n"


def _ranked(records: Sequence[Record], metrics: Mapping[str, Metric], judges: Judges) -> list[str]:
    """A caption and the headline columns of each task, by rank."""
    columns = _columns(LEADERBOARD, metrics)
    standing = standings(records, judges)
    ranks = (
        f"*{RANKED_BY.label}*: {RANKED_BY.meaning}; over all calibration seeds, with its 95 % interval over images and"
        " seeds. A rank is 1 plus the number of methods at the same precision that are better image by image and seed"
        " by seed, beyond the 95 % interval of the difference: the intervals in the column may overlap all the same."
        " KID, which papers rank by, is a column."
    )
    return [
        f"### {task}\n\n{caption(cells)} {ranks}{_more_seeds(task, cells, judges)}\n\n"
        + cells_table(cells, columns, ("kid_fp",), cost=True, standing=standing, rank=True)
        for task, cells in by_task(records, metrics, standing).items()
    ]


def ablation(records: Sequence[Record], metrics: Mapping[str, Metric], judges: Judges) -> str:
    """Markdown of the rows that explain the methods, beside these, in the order of ``records``; none has a rank."""
    columns = _columns(ABLATION, metrics)
    standing = standings(records, judges)
    parts = [
        f"### {task}\n\nRows that differ from a method in one thing, and the methods that they explain."
        f" {caption(cells)}{_more_seeds(task, cells, judges)}\n\n"
        + cells_table(cells, columns, tuple(columns), cost=True, standing=standing)
        for task, cells in by_task(records, metrics).items()
    ]
    return "\n\n".join(parts) + "\n"


def _more_seeds(task: str, cells: Sequence[Record], judges: Judges) -> str:
    """A sentence where rows of a task are judged by more calibration seeds than a table shows; else nothing."""
    shown = Counter((record.cell.row, record.precision) for record in cells)
    known = judges[task].records if task in judges else {}
    if all(len(known.get(row, ())) <= count for row, count in shown.items()):
        return ""
    return f" *{RANKED_BY.label}* of rows that another table measures with more calibration seeds is over all of these."


OWN_LAYERS = {
    "published": (
        "How much of a method's result is its choice of layers: under `shared` all quantise the same ones, under"
        " `published` those of its own code or paper."
    ),
    "as_run": (
        "What released codes quantise when they run, and that is not always what their papers say: `as_run` beside"
        " `shared`."
    ),
}


def own_layers(records: Sequence[Record], metrics: Mapping[str, Metric], protocol: str) -> str:
    """Markdown with each method under the shared and its own protocol side by side, and what the latter leaves out.

    ``protocol`` is a key of `OWN_LAYERS`.
    """
    parts = []
    for task, every in by_task(records, metrics).items():
        cells = [record for record in every if record.seed == 0]
        columns = measured(_columns(PUBLISHED, metrics), cells)
        shared = {(r.method, r.precision): r for r in cells if r.protocol == SHARED}
        rows = []
        for record in cells:
            if record.protocol == SHARED:
                continue
            row = {"Precision": record.precision, "Method": label(record.method)}
            for title, found in ((SHARED, shared.get((record.method, record.precision))), (protocol, record)):
                for name, metric in columns.items():
                    value = found.metrics.get(name) if found else None
                    row[f"{heading(metric, cells)}, {title}"] = number(value, metric.digits, interval=True)
            row["Its own protocol"] = left_out(record.method, protocol)
            row["Note"] = note(record)
            rows.append(row)
        parts.append(f"### {task}\n\n{OWN_LAYERS[protocol]} {caption(cells)}\n\n{table(rows)}")
    return "\n\n".join(parts) + "\n"


def deployed(
    records: Sequence[Record], metrics: Mapping[str, Metric], images: Mapping[Cell, Mapping[str, np.ndarray]]
) -> str:
    """Markdown with each row as it is executed, beside the same row simulated on the grids of its paper.

    ``images`` holds the values of each cell's images (N,) by metric.
    """
    parts = []
    for task, every in by_task(records, metrics).items():
        cells = [record for record in every if record.seed == 0]
        columns = measured(_columns(DEPLOYED, metrics), cells)
        simulated = {(r.method, r.precision): r for r in cells if r.backend == SIMULATED}
        rows = []
        for record in cells:
            if record.backend == SIMULATED:
                continue
            other = simulated.get((record.method, record.precision))
            row = {"Precision": record.precision, "Method": label(record.method)}
            for name, metric in columns.items():
                title = heading(metric, cells)
                for backend, found in ((SIMULATED, other), (record.backend, record)):
                    value = found.metrics.get(name) if found else None
                    row[f"{title}, {backend}"] = number(value, metric.digits, interval=False)
                row[f"{title}, difference"] = number(_apart(name, record, other, images), metric.digits, interval=True)
            rows.append(row | {"Note": note(record)})
        text = (
            "What executing costs: the same rows, *simulated* in float32 on the grids of their papers as in the"
            " leaderboard, and *executed* in integers on deployable grids (symmetric for weights of 8 bits, and for"
            " query, key and value), quantised anew for these. *Difference* is executed less simulated, the mean over"
            " images of the same noise, with its 95 % interval: of the grids and of the arithmetic together."
        )
        parts.append(f"### {task}\n\n{text} {caption(cells)}\n\n{table(rows)}")
    return "\n\n".join(parts) + "\n"


def _apart(
    name: str, record: Record, other: Record | None, images: Mapping[Cell, Mapping[str, np.ndarray]]
) -> Value | None:
    """How far a metric of a row is from that of another one, by image; None where it is not measured of both."""
    values = [images.get(found.cell, {}).get(name) for found in (record, other) if found is not None]
    if len(values) < 2 or any(value is None for value in values):
        return None
    return difference(*values)


def left_out(method: str, name: str) -> str:
    """What a method's own protocol of that name gives other bits than the precision's, in words."""
    known = method in discover.names(discover.METHODS)
    protocol = discover.method(method).protocol(name) if known else None
    if protocol is None:
        return NOTHING
    parts = _in_words(protocol.bits) or ["all layers at the stated bits, the first and last too"]
    parts += [f"inputs of {part}" for part in _in_words(protocol.inputs)]
    if protocol.softmax_bits:
        parts.append(f"attention probabilities at {protocol.softmax_bits} bits or more")
    return "; ".join(parts)


def _in_words(bits: Mapping[str, int]) -> list[str]:
    """Roles by their bits, those in full precision first."""
    by_bits: dict[int, list[str]] = {}
    for role, count in bits.items():
        by_bits.setdefault(count, []).append(role.replace("_", " "))
    return [
        f"{', '.join(roles)} {'in full precision' if count == FULL else f'at {count} bits'}"
        for count, roles in sorted(by_bits.items(), reverse=True)
    ]


def _columns(names: Sequence[str], metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    return {name: metrics[name] for name in names if name in metrics}
