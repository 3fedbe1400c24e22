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
from benchmarks.record import FULL_PRECISION, SHARED, Record, Value
from tfmq.precision import FULL, Precision

RANKED_BY = "kid_fp"
# The columns of each table; the full one has every metric.
LEADERBOARD = ("kid_fp", "feature_distance", "fd_data", "temporal_error")
ABLATION = ("kid_fp", "feature_distance", "psnr", "noise_error", "temporal_error")
PUBLISHED = ("kid_fp", "feature_distance")
START, END = "<!-- leaderboard -->", "<!-- /leaderboard -->"
NOTHING = "–"
SHARED_TEXT = (
    "Protocol `shared`: every method quantises the same layers (all Conv2d and Linear at the stated bits, the first and"
    " last layer at 8 bits, attention products and softmax at the activation bits)."
)
RANK_TEXT = (
    f"A rank is 1 plus the number of methods at the same precision whose interval of {RANKED_BY} lies entirely below."
)
STATUS_KEYS = ("task", "task_version", "method", "precision", "seed", "protocol", "status", "reason")


def frame(tables: Mapping[str, Sequence[Record]], metrics: Mapping[str, Metric]) -> pd.DataFrame:
    """One row a cell: what it is, its rank in its table, every metric with `_low`, `_high` and `_n`, and its cost.

    ``tables`` holds the records that each table measures. Rows are table by table, by task, from many bits to few, by
    rank. What was not measured is missing. Raises ValueError for records that must not be compared: a cell twice, or
    one task under different settings; and for metrics that no file describes.
    """
    _check([record for records in tables.values() for record in records], metrics)
    rows = []
    for name, records in tables.items():
        ranks = ranking(records)
        ordered = sorted(records, key=_order(ranks))
        rows += [{"table": name} | _row(record, metrics, ranks.get(record.cell.name)) for record in ordered]
    table = pd.DataFrame(rows)
    whole = [column for column in table if column == "rank" or column.endswith("_n")]
    return table.astype(dict.fromkeys(whole, "Int64"))


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
    """Markdown with a caption and a table of the headline columns for each task, ordered by rank."""
    columns = _columns(LEADERBOARD, metrics)
    parts = [
        f"### {task}\n\n{caption(cells)} {RANK_TEXT}\n\n"
        + _markdown(cells, columns, intervals=(RANKED_BY,), cost=True, rank=True)
        for task, cells in _tasks(records, metrics, ranked=True).items()
    ]
    return "\n\n".join(parts) + "\n"


def ablation(records: Sequence[Record], metrics: Mapping[str, Metric]) -> str:
    """Markdown of the rows that explain the methods, beside these, in the order of ``records``; none has a rank."""
    columns = _columns(ABLATION, metrics)
    parts = [
        f"### {task}\n\nRows that differ from a method in one thing, and the methods that they explain."
        f" {caption(cells)}\n\n{_markdown(cells, columns, intervals=tuple(columns), cost=True, rank=False)}"
        for task, cells in _tasks(records, metrics, ranked=False).items()
    ]
    return "\n\n".join(parts) + "\n"


def published(records: Sequence[Record], metrics: Mapping[str, Metric]) -> str:
    """Markdown with each method under the shared and its own protocol side by side, and what the latter leaves out."""
    columns = _columns(PUBLISHED, metrics)
    parts = []
    for task, cells in _tasks(records, metrics, ranked=False).items():
        settings = cells[0].settings["task"]
        distance = extractor(settings["evaluator"]).distance_label
        shared = {(r.method, r.precision, r.seed): r for r in cells if r.protocol == SHARED}
        rows = []
        for record in cells:
            if record.protocol == SHARED:
                continue
            row = {"Precision": record.precision, "Method": label(record.method)}
            for protocol, found in (
                ("shared", shared.get((record.method, record.precision, record.seed))),
                ("published", record),
            ):
                for name, metric in columns.items():
                    value = found.metrics.get(name) if found else None
                    heading = f"{_heading(metric, distance, settings['images'])}, {protocol}"
                    row[heading] = _number(value, metric.digits, interval=True)
            row["Its own protocol"] = left_out(record.method)
            row["Note"] = _note(record)
            rows.append(row)
        text = (
            "How much of a method's result is its choice of layers: under `shared` all quantise the same ones, under"
            " `published` those of its own code or paper. First and last layer have 8 bits where nothing else is said."
        )
        parts.append(f"### {task}\n\n{text} {caption(cells)}\n\n{_table(rows)}")
    return "\n\n".join(parts) + "\n"


def left_out(method: str) -> str:
    """The roles of layers to which a method's own protocol gives other bits than the precision's, in words."""
    if method not in discover.names(discover.METHODS) or discover.method(method).published is None:
        return NOTHING
    by_bits: dict[int, list[str]] = {}
    for role, bits in discover.method(method).published.bits.items():
        by_bits.setdefault(bits, []).append(role.replace("_", " "))
    parts = [
        f"{', '.join(roles)} {'in full precision' if bits == FULL else f'at {bits} bits'}"
        for bits, roles in sorted(by_bits.items(), reverse=True)
    ]
    return "; ".join(parts) or "all layers at the stated bits, the first and last too"


def report(
    tables: Mapping[str, Sequence[Record]], metrics: Mapping[str, Metric], figures: Sequence[tuple[str, str]]
) -> str:
    """The page `results/README.md`: every table, every metric with its interval, and figures.

    ``tables`` maps a table's name to the records that it shows, ``figures`` are pairs of a caption and a path relative
    to the page.
    """
    head = (
        "# Results\n\nGenerated by the `tables` stage from the records in `records/`; do not edit. `cells.csv` has all"
        " numbers for pandas. What each row does: [METHODS.md](METHODS.md). What it quantises:"
        " [COVERAGE.md](COVERAGE.md). Which of the papers' claims hold: [FINDINGS.md](FINDINGS.md)."
    )
    parts = [head]
    for name, records in tables.items():
        parts.append(f"## {name.capitalize()}\n\n{RENDERERS[name](records, metrics).rstrip()}")
    parts.append("## All metrics")
    for name, records in tables.items():
        for task, cells in _tasks(records, metrics, ranked=False).items():
            every = _markdown(cells, metrics, intervals=tuple(metrics), cost=False, rank=False)
            parts.append(f"### {task}, {name}\n\n{every}")
    if figures:
        parts.append("## Figures")
    parts += [f"![{text}]({path})\n\n{text}" for text, path in figures]
    return "\n\n".join(parts) + "\n"


RENDERERS = {"leaderboard": leaderboard, "ablation": ablation, "published": published}


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
    """What the numbers of one task's table are: version, settings, counts, evaluator, what was simulated and where."""
    first = records[0]
    task = first.settings["task"]
    costs = [record.cost for record in records if record.cost is not None]
    devices = sorted({cost.device for cost in costs})
    executions = sorted({cost.execution for cost in costs})
    sentences = [
        f"Version {first.task_version}.",
        *([SHARED_TEXT] if all(record.protocol == SHARED for record in records) else []),
        f"{task['images']} images a cell at {task['resolution']} x {task['resolution']},"
        f" {task['steps']} {task['scheduler'].upper()} steps, eta {task['eta']:g}, guidance {task['guidance_scale']:g};"
        f" calibrated on {task['calibration_images']} images.",
        f"FP is the full-precision model: {task['reference_images']} of its samples from other seeds, or, for paired"
        " columns, its sample from the same noise.",
        f"Evaluator `{task['evaluator']}`; brackets are 95 % intervals.",
    ]
    if executions == ["simulated"]:
        sentences.append("Low-bit arithmetic is simulated (fake-quantised), so no number here is a speed-up.")
    if devices:
        sentences.append(
            f"Quantisation time is wall time on {', '.join(devices)}, of one thread where that is a CPU, and includes"
            " recording the calibration pool."
        )
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
    return json.dumps([record.task_version, record.settings["task"]], sort_keys=True)


def _order(ranks: Mapping[str, int]) -> Callable[[Record], tuple[object, ...]]:
    def key(record: Record) -> tuple[object, ...]:
        rank = ranks.get(record.cell.name)
        value = record.metrics.get(RANKED_BY)
        return (
            *_place(record),
            record.seed,
            (rank is None, rank or 0),
            (value is None, value.value if value else 0.0),
            record.method,
        )

    return key


def _place(record: Record) -> tuple[str, int, int]:
    precision = Precision.parse(record.precision)
    return record.task, -precision.weight_bits, -precision.activation_bits


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


def _columns(names: Sequence[str], metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    return {name: metrics[name] for name in names if name in metrics}


def _tasks(records: Sequence[Record], metrics: Mapping[str, Metric], ranked: bool) -> dict[str, list[Record]]:
    """Records by task, from many bits to few; then by rank, or as they are given."""
    _check(records, metrics)
    ordered = sorted(records, key=_order(ranking(records)) if ranked else _place)
    return {task: [r for r in ordered if r.task == task] for task in dict.fromkeys(r.task for r in ordered)}


def _markdown(
    records: Sequence[Record], metrics: Mapping[str, Metric], intervals: Sequence[str], cost: bool, rank: bool
) -> str:
    """The table of one task; columns that say nothing (one seed only, no remarks) are left out."""
    ranks = ranking(records)
    task = records[0].settings["task"]
    distance = extractor(task["evaluator"]).distance_label
    protocols = len({record.protocol for record in records if record.method != FULL_PRECISION}) > 1
    rows = []
    for record in records:
        name = label(record.method) + (f" ({record.protocol})" if protocols and record.method != FULL_PRECISION else "")
        row = {"Precision": record.precision, "Method": name, "Seed": str(record.seed)}
        if rank:
            row["Rank"] = str(ranks.get(record.cell.name, NOTHING))
        for name, metric in metrics.items():
            value = record.metrics.get(name)
            row[_heading(metric, distance, task["images"])] = _number(value, metric.digits, name in intervals)
        if cost:
            row["Quantisation time"] = _duration(record)
            row["UNet (MiB)"] = NOTHING if record.cost is None else f"{record.cost.size_mib:.2f}"
        rows.append(row | {"Note": _note(record)})
    return _table(rows)


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    table = pd.DataFrame(rows)
    if "Seed" in table and table["Seed"].nunique() == 1:
        table = table.drop(columns="Seed")
    if (table["Note"] == "").all():
        table = table.drop(columns="Note")
    align = ["left" if column in ("Precision", "Method", "Its own protocol", "Note") else "right" for column in table]
    return table.to_markdown(index=False, disable_numparse=True, colalign=align)


def _heading(metric: Metric, distance: str, images: int) -> str:
    return metric.title(distance, images) + {"lower": " ↓", "higher": " ↑", None: ""}[metric.better]


def _note(record: Record) -> str:
    return "" if record.status == "measured" else f"{record.status}: {record.reason}".replace("|", "\\|")


def label(method: str) -> str:
    """A method's name in tables and figures: its file's label; a method that has no file any more goes by its name."""
    if method == FULL_PRECISION:
        return "Full precision"
    return discover.method(method).label if method in discover.names(discover.METHODS) else method


def _number(value: Value | None, digits: int, interval: bool) -> str:
    if value is None:
        return NOTHING
    text = f"{value.value:z.{digits}f}"
    shown = interval and value.low < value.high
    return f"{text} [{value.low:z.{digits}f}, {value.high:z.{digits}f}]" if shown else text


def _duration(record: Record) -> str:
    if record.cost is None or record.method == FULL_PRECISION:
        return NOTHING
    seconds = record.cost.quantization_seconds
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
