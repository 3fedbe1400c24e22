"""Records to tables: a data frame with one row a cell, and from it Markdown and CSV. Nothing here touches files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence

import pandas as pd

from benchmarks import discover
from benchmarks.discover import unknown
from benchmarks.features import extractor
from benchmarks.metrics import Metric
from benchmarks.record import FULL_PRECISION, Record, Value
from tfmq.precision import Precision

RANKED_BY = "kid_fp"
# The columns of the leaderboard; the full table has every metric.
HEADLINE = ("kid_fp", "feature_distance", "fd_data", "temporal_error")
START, END = "<!-- leaderboard -->", "<!-- /leaderboard -->"
NOTHING = "–"
PROTOCOLS = {
    "shared": (
        "every method quantises the same layers (all Conv2d and Linear at the stated bits, the first and last layer at"
        " 8 bits, attention products and softmax at the activation bits)"
    ),
}
STATUS_KEYS = ("task", "task_version", "method", "precision", "seed", "protocol", "status", "reason")


def frame(records: Sequence[Record], metrics: Mapping[str, Metric]) -> pd.DataFrame:
    """One row a cell: what it is, its rank, every metric with `_low`, `_high` and `_n`, and its cost.

    Rows are in the order of the tables: by task, from many bits to few, by rank. What was not measured is missing.
    Raises ValueError for records that must not share a table: a cell twice, or one task under different settings; and
    for metrics that no file describes.
    """
    _check(records, metrics)
    ranks = ranking(records)
    rows = [_row(record, metrics, ranks.get(record.cell.name)) for record in sorted(records, key=_order(ranks))]
    table = pd.DataFrame(rows)
    whole = [column for column in table if column == "rank" or column.endswith("_n")]
    return table.astype(dict.fromkeys(whole, "Int64"))


def ranking(records: Sequence[Record]) -> dict[str, int]:
    """Rank of each measured, quantised cell by KID to full precision, within its task, precision and seed.

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
                    raise discover.unknown(
                        f"metric in gates.{record.task}", name, record.metrics, "Gates bound metrics."
                    )
                value = record.metrics[name].value
                if not low <= value <= high:
                    broken[record.task] = f"full precision has {name} {value:.4g}, expected {low:g} to {high:g}"
    return [
        dataclasses.replace(record, status="unverified", reason=broken[record.task])
        if record.task in broken and record.status == "measured"
        else record
        for record in records
    ]


def csv(table: pd.DataFrame) -> str:
    """The frame as CSV with eight significant digits; `pandas.read_csv` reads it back."""
    return table.to_csv(index=False, float_format="%.8g", lineterminator="\n")


def leaderboard(records: Sequence[Record], metrics: Mapping[str, Metric]) -> str:
    """Markdown with a caption and a table of the headline columns for each task."""
    headline = {name: metrics[name] for name in HEADLINE if name in metrics}
    parts = [
        f"### {task}\n\n{caption(cells)}\n\n{_markdown(cells, headline, intervals=(RANKED_BY,), cost=True)}"
        for task, cells in _tasks(records, metrics).items()
    ]
    return "\n\n".join(parts) + "\n"


def report(records: Sequence[Record], metrics: Mapping[str, Metric], figures: Sequence[tuple[str, str]]) -> str:
    """The page `results/README.md`: the leaderboard, every metric with its interval, and figures.

    ``figures`` are pairs of a caption and a path relative to the page.
    """
    every = [
        f"### {task}: all metrics\n\n{_markdown(cells, metrics, intervals=tuple(metrics), cost=False)}"
        for task, cells in _tasks(records, metrics).items()
    ]
    shown = [f"![{text}]({path})\n\n{text}" for text, path in figures]
    head = (
        "# Results\n\nGenerated by the `tables` stage from the records in `records/`; do not edit."
        " `leaderboard.csv` has the same numbers for pandas."
    )
    return "\n\n".join([head, leaderboard(records, metrics).rstrip(), *every, *shown]) + "\n"


def region(text: str) -> str:
    """What stands between the leaderboard markers, without surrounding space.

    Raises ValueError unless each marker occurs once, in order.
    """
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise ValueError(f"the text needs one {START} followed by one {END}: put them where the leaderboard goes")
    return text[text.index(START) + len(START) : text.index(END)].strip()


def replace_region(text: str, content: str) -> str:
    """``text`` with ``content`` between the leaderboard markers. Raises ValueError as `region` does."""
    region(text)
    before, after = text[: text.index(START)], text[text.index(END) + len(END) :]
    return f"{before}{START}\n\n{content.strip()}\n\n{END}{after}"


def caption(records: Sequence[Record]) -> str:
    """What the numbers of one task's table are: protocol, settings, counts, evaluator, what was simulated and where."""
    first = records[0]
    task = first.settings["task"]
    costs = [record.cost for record in records if record.cost is not None]
    devices = sorted({cost.device for cost in costs})
    executions = sorted({cost.execution for cost in costs})
    sentences = [
        f"Version {first.task_version}, protocol `{first.protocol}`: {PROTOCOLS[first.protocol]}.",
        f"{task['images']} images a cell at {task['resolution']} x {task['resolution']},"
        f" {task['steps']} {task['scheduler'].upper()} steps, eta {task['eta']:g}, guidance {task['guidance_scale']:g};"
        f" calibrated on {task['calibration_images']} images.",
        f"FP is the full-precision model: {task['reference_images']} of its samples from other seeds, or, for paired"
        " columns, its sample from the same noise.",
        f"Evaluator `{task['evaluator']}`; brackets are 95 % intervals.",
        f"A rank is 1 plus the number of methods at the same precision whose interval of {RANKED_BY} lies entirely"
        " below.",
    ]
    if executions == ["simulated"]:
        sentences.append("Low-bit arithmetic is simulated (fake-quantised), so no number here is a speed-up.")
    if devices:
        sentences.append(f"Quantisation time is wall time on {', '.join(devices)}.")
    return " ".join(sentences)


def _check(records: Sequence[Record], metrics: Mapping[str, Metric]) -> None:
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


def _comparable(record: Record) -> str:
    return json.dumps([record.task_version, record.protocol, record.settings["task"]], sort_keys=True)


def _order(ranks: Mapping[str, int]) -> Callable[[Record], tuple[object, ...]]:
    def key(record: Record) -> tuple[object, ...]:
        precision = Precision.parse(record.precision)
        rank = ranks.get(record.cell.name)
        value = record.metrics.get(RANKED_BY)
        return (
            record.task,
            -precision.weight_bits,
            -precision.activation_bits,
            record.seed,
            (rank is None, rank or 0),
            (value is None, value.value if value else 0.0),
            record.method,
        )

    return key


def _row(record: Record, metrics: Mapping[str, Metric], rank: int | None) -> dict[str, object]:
    row: dict[str, object] = {key: getattr(record, key) for key in STATUS_KEYS} | {"rank": rank}
    for name in metrics:
        value = record.metrics.get(name)
        for field in dataclasses.fields(Value):
            column = name if field.name == "value" else f"{name}_{field.name}"
            row[column] = getattr(value, field.name) if value else None
    if record.cost is not None:
        cost = dataclasses.asdict(record.cost)
        row |= {f"seconds_{phase}": seconds for phase, seconds in cost.pop("seconds").items()}
        row |= {"quantization_seconds": record.cost.quantization_seconds} | cost
    return row


def _tasks(records: Sequence[Record], metrics: Mapping[str, Metric]) -> dict[str, list[Record]]:
    _check(records, metrics)
    ordered = sorted(records, key=_order(ranking(records)))
    return {task: [r for r in ordered if r.task == task] for task in dict.fromkeys(r.task for r in ordered)}


def _markdown(records: Sequence[Record], metrics: Mapping[str, Metric], intervals: Sequence[str], cost: bool) -> str:
    """The table of one task; columns that say nothing (one seed only, no remarks) are left out."""
    ranks = ranking(records)
    task = records[0].settings["task"]
    distance = extractor(task["evaluator"]).distance_label
    rows = []
    for record in records:
        row = {"Precision": record.precision, "Method": label(record.method), "Seed": str(record.seed)}
        row["Rank"] = str(ranks.get(record.cell.name, NOTHING))
        for name, metric in metrics.items():
            heading = metric.title(distance, task["images"]) + {"lower": " ↓", "higher": " ↑", None: ""}[metric.better]
            row[heading] = _number(record.metrics.get(name), metric.digits, name in intervals)
        if cost:
            row["Quantisation time"] = _duration(record)
            row["UNet (MiB)"] = NOTHING if record.cost is None else f"{record.cost.size_mib:.2f}"
        row["Note"] = "" if record.status == "measured" else f"{record.status}: {record.reason}".replace("|", "\\|")
        rows.append(row)
    table = pd.DataFrame(rows)
    if table["Seed"].nunique() == 1:
        table = table.drop(columns="Seed")
    if (table["Note"] == "").all():
        table = table.drop(columns="Note")
    align = ["left" if column in ("Precision", "Method", "Note") else "right" for column in table]
    return table.to_markdown(index=False, disable_numparse=True, colalign=align)


def label(method: str) -> str:
    """A method's name in tables and figures: its file's label; a method that has no file any more goes by its name."""
    if method == FULL_PRECISION:
        return "Full precision"
    return discover.method(method).label if method in discover.names(discover.METHODS) else method


def _number(value: Value | None, digits: int, interval: bool) -> str:
    if value is None:
        return NOTHING
    text = f"{value.value:z.{digits}f}"
    return f"{text} [{value.low:z.{digits}f}, {value.high:z.{digits}f}]" if interval else text


def _duration(record: Record) -> str:
    if record.cost is None or record.method == FULL_PRECISION:
        return NOTHING
    seconds = record.cost.quantization_seconds
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
