"""Numbers that papers report beside those measured here: both values, their difference, and whether it is small.

`baselines/reported.csv` has one reported number a line: the name it goes by there (``task``), method and precision in
this project's names, metric, value as printed, marker, how many images were scored where that is known, and source. A
suite says in `params.yaml` which of those names its tasks have (``reported.tasks``) and which differences are small
(``reported.tolerances``). Nothing is ever filled in from the one side to the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import pandas as pd

from benchmarks.features import extractor
from benchmarks.report.tables.markdown import (
    NOTHING,
    duration,
    label,
    note,
    number,
    row_label,
    sampling,
    table,
    tensor_float32,
)
from benchmarks.suite.discover import unknown
from benchmarks.suite.params import Suite
from benchmarks.suite.record import FULL_PRECISION, Record, Value
from tfmq.precision import Precision

MISSING = "not measured here"
NO_CELL = "no cell of this suite"
FID = "FID"
SIZE = "size_mib"
ROUNDING = 1e-9
# What a mark says is the source's business; its captions are not part of our copy. This is what fits where the marks
# stand: † where code was public for the model, * where it was not, none at numbers of the methods' own papers.
MARKS = {
    "*": "run by the authors of the source with their own implementation of the method for this model",
    "†": "run by the authors of the source with the method's released code",
}


@dataclass(frozen=True)
class Column:
    """A metric of the reported numbers.

    Attributes:
        heading: with an arrow to its better side.
        ours: the metric here that it is compared with, or None; ``size_mib`` is that of the UNet in a cell's cost.
        scale: what a reported value is multiplied with to be in our units.
        inception: it is a number of the FID Inception network, and depends on how many images are scored.
    """

    heading: str
    ours: str | None = None
    scale: float = 1.0
    inception: bool = False


COLUMNS = {
    "is": Column("IS ↑", "is_score", inception=True),
    "fid": Column("FID ↓", "fd_data", inception=True),
    "sfid": Column("sFID ↓", "sfd_data", inception=True),
    "clip": Column("CLIP ↑", "clip_score", scale=100.0),
    "unet_size_mb": Column("UNet (MiB) ↓", SIZE),
    "latency_s": Column("Latency (s) ↓"),
    "speedup": Column("Speed-up ↑"),
    "fid_below_previous": Column("FID below that of earlier work ↑"),
    "quantization_speedup_vs_previous": Column("Quantisation speed-up over earlier work ↑"),
}


@dataclass(frozen=True)
class Number:
    """One reported number: a line of `reported.csv`. ``precision`` is empty where it is of none in particular."""

    task: str
    method: str
    precision: str
    metric: str
    value: str
    marker: str
    images: int | None
    source: str

    @property
    def column(self) -> Column:
        return COLUMNS[self.metric]

    @property
    def scaled(self) -> float:
        """The value in our units."""
        return float(self.value) * self.column.scale

    @property
    def shown(self) -> str:
        """The value with its mark, for Markdown."""
        value = self.value if self.column.scale == 1 else f"{self.scaled:.2f}"
        return value + self.marker.replace("*", "\\*")


def numbers_of(reported: pd.DataFrame) -> list[Number]:
    """The lines of `reported.csv`, read as text. Raises ValueError for a metric that has no column here."""
    found = []
    for row in reported.to_dict("records"):
        if row["metric"] not in COLUMNS:
            raise unknown(
                "metric in reported.csv", row["metric"], COLUMNS, "Add it to benchmarks/report/tables/paper.py."
            )
        found.append(Number(**row | {"images": int(row["images"]) if row["images"] else None}))
    return found


def reported_gates(
    records: Sequence[Record], suite: Suite, numbers: Sequence[Number]
) -> dict[str, dict[str, tuple[float, float]]]:
    """Bounds, as `gated` takes them, that the reported full-precision numbers put on the suite's own.

    A number bounds what it can be compared with: the same metric of as many images, where both are known. A suite
    without ``reported`` has none.
    """
    gates: dict[str, dict[str, tuple[float, float]]] = {}
    for record in records:
        if suite.reported is None or record.method != FULL_PRECISION:
            continue
        for found in _of_task(record.task, suite, numbers):
            column, value = found.column, _value(record, found.column)
            tolerance = suite.reported.tolerances.get(column.ours)
            if found.method != FULL_PRECISION or value is None or tolerance is None or column.ours == SIZE:
                continue
            if not _other_count(found, value):
                gates.setdefault(record.task, {})[column.ours] = _bounds(found, tolerance)
    return gates


def paper(records: Sequence[Record], suite: Suite, numbers: Sequence[Number]) -> str:
    """Markdown with every number that is reported of the suite's tasks, and what ``records`` have beside it.

    ``records`` are those that exist, of any status. Raises ValueError for unknown names in ``reported``.
    """
    _check(suite, numbers)
    shown = [found for task in suite.reported.tasks for found in _of_task(task, suite, numbers)]
    sources = {source: index for index, source in enumerate(dict.fromkeys(n.source for n in shown), 1)}
    parts = [_introduction(suite, shown), _legend(shown, sources)]
    for task, names in suite.reported.tasks.items():
        setting = suite.tasks[task]
        clip = f" CLIP is `{setting.clip[0]}`." if setting.clip else ""
        own = [record for record in records if record.task == task and record.seed == 0]
        told = "".join(f" {sentence}" for sentence in tensor_float32(own))
        parts.append(f"### {task}\n\n{sampling(asdict(setting))} Evaluator `{setting.evaluator}`.{clip}{told}")
        for name in names:
            of_name = [found for found in shown if found.task == name]
            parts.append(f"Reported as `{name}`:")
            if any(found.precision for found in of_name):
                parts.append(_table(task, own, suite, of_name, sources))
            parts += [_sentence(found, sources[found.source]) for found in of_name if not found.precision]
    return "\n\n".join(parts) + "\n"


def _sentence(found: Number, source: int) -> str:
    name = found.column.heading[:-2]
    return f"{name} of {label(found.method)}, at no stated precision: {found.shown} (source {source}), {MISSING}."


def _of_task(task: str, suite: Suite, numbers: Sequence[Number]) -> list[Number]:
    names = suite.reported.tasks.get(task, ())
    return [found for found in numbers if found.task in names]


def _check(suite: Suite, numbers: Sequence[Number]) -> None:
    names = {found.task for found in numbers}
    for task, given in suite.reported.tasks.items():
        for name in given:
            if name not in names:
                raise unknown(f"name in reported.tasks.{task}", name, names, "Those in reported.csv are meant.")
    compared = {column.ours for column in COLUMNS.values() if column.ours}
    for metric in suite.reported.tolerances:
        if metric not in compared:
            raise unknown("metric in reported.tolerances", metric, compared, "Only these are compared.")


def _introduction(suite: Suite, shown: Sequence[Number]) -> str:
    tolerances = [
        f"{column.heading[:-2]} {suite.reported.tolerances[column.ours]:g}"
        for metric, column in COLUMNS.items()
        if column.ours in suite.reported.tolerances and any(found.metric == metric for found in shown)
    ]
    return (
        "What papers report, as printed there, beside what was measured here, with the count n of images and a 95 %"
        " interval. A difference is measured minus reported; it is *within* where it is no larger than the tolerance"
        f" ({', '.join(tolerances)}), else *outside*. FID, sFID and IS depend on how many images are scored: where"
        f" another count is reported, the difference says *other n* and decides nothing. *{MISSING.capitalize()}* means"
        f" just that: nothing is filled in; *{NO_CELL}* says that none would measure it. A row without a protocol"
        " quantises the same layers under every method, a row that says *published* those of the method's own code, as"
        " the papers do. Full precision comes first: where it is outside a tolerance, checkpoint, sampler or evaluator"
        " are not those of the papers, and all cells of the task are unverified. CLIP scores are 100 x the cosine."
        " Low-bit arithmetic is simulated here, so that no latency is measured; sizes are those of packed weights."
    )


def _legend(shown: Sequence[Number], sources: Mapping[str, int]) -> str:
    used = [mark for mark in MARKS if any(found.marker == mark for found in shown)]
    marks = "; ".join(f"{mark} {MARKS[mark]}".replace("*", "\\*") for mark in used)
    parts = [
        f"Marks are those of the source, and as far as its numbers tell, they say: {marks}." if marks else "",
        f"Sources: {'; '.join(f'{index} {source}' for source, index in sources.items())}.",
        "How many images a source scored is partly known from second-hand notes only.",
    ]
    return " ".join(part for part in parts if part)


def _table(
    task: str, records: Sequence[Record], suite: Suite, numbers: Sequence[Number], sources: Mapping[str, int]
) -> str:
    """One line for each method and precision that is reported, or several where it was measured in several ways."""
    ours = {(cell.precision, cell.method) for cell in suite.cells() if cell.task == task}
    cells: dict[tuple[str, str], dict[str, Number]] = {}
    for found in numbers:
        if found.precision:
            cells.setdefault((found.precision, found.method), {})[found.metric] = found
    metrics = [metric for metric in COLUMNS if any(metric in own for own in cells.values())]
    rows = []
    for (precision, method), own in sorted(cells.items(), key=lambda cell: _place(*cell[0])):
        measured = [record for record in records if (record.precision, record.method) == (precision, method)]
        for record in measured or [None]:
            row = {"Precision": precision, "Method": label(method) if record is None else row_label(record)}
            for metric in metrics:
                why = MISSING if (precision, method) in ours else NO_CELL
                row |= _cells(COLUMNS[metric], own.get(metric), record, suite, why)
            row["Quantisation time"] = NOTHING if record is None else duration(record)
            if "unet_size_mb" not in metrics:
                row["UNet (MiB)"] = number(_size(record), 2, interval=False)
            row["Source"] = ", ".join(str(index) for index in sorted({sources[n.source] for n in own.values()}))
            row["Note"] = "" if record is None else note(record)
            rows.append(row)
    return table(rows)


def _place(precision: str, method: str) -> tuple[int, int]:
    bits = Precision.parse(precision)
    return -bits.weight_bits, -bits.activation_bits


def _cells(column: Column, found: Number | None, record: Record | None, suite: Suite, missing: str) -> dict[str, str]:
    """The columns of one metric: reported, measured, difference; one alone where nothing here compares.

    ``missing`` says why there is no measured number where there is none.
    """
    if column.ours is None:
        return {column.heading: NOTHING if found is None else f"{found.shown}, {MISSING}"}
    value = None if record is None else _value(record, column)
    measured = number(value, 2, interval=True)
    if value is not None and column.ours != SIZE:
        measured += f" (n {value.n:,})"
    compared = NOTHING
    if found is not None:
        tolerance = suite.reported.tolerances.get(column.ours)
        compared = missing if value is None else _difference(found, value, tolerance)
    return {
        f"{column.heading} reported": NOTHING if found is None else found.shown,
        f"{column.heading} measured": measured,
        f"{column.heading} difference": compared,
    }


def _difference(found: Number, value: Value, tolerance: float | None) -> str:
    difference = f"{value.value - found.scaled:+.2f}"
    if _other_count(found, value):
        return f"{difference}, other n"
    if tolerance is None:
        return f"{difference}, no tolerance"
    low, high = _bounds(found, tolerance)
    return f"{difference}, {'within' if low <= value.value <= high else 'outside'}"


def _bounds(found: Number, tolerance: float) -> tuple[float, float]:
    """What counts as the reported number; a difference of just the tolerance does, whatever its last bit."""
    reach = tolerance + ROUNDING
    return found.scaled - reach, found.scaled + reach


def _other_count(found: Number, value: Value) -> bool:
    return found.column.inception and found.images not in (None, value.n)


def _value(record: Record, column: Column) -> Value | None:
    """What the record has to compare, which for distances is nothing where they are not on FID's features."""
    if column.ours == SIZE:
        return _size(record)
    evaluator = record.settings["task"]["evaluator"]
    if column.inception and extractor(evaluator).distance_label != FID:
        return None
    return record.metrics.get(column.ours)


def _size(record: Record | None) -> Value | None:
    if record is None or record.cost is None:
        return None
    return Value(record.cost.size_mib, record.cost.size_mib, record.cost.size_mib, 1)
