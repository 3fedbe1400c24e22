"""The page as one HTML text: what `page.html` is filled with. Nothing here writes files."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import distribution, version
from importlib.resources import files as resources
from pathlib import Path

import vl_convert
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from benchmarks.features import extractor
from benchmarks.metrics import Metric
from benchmarks.report.site.charts import NO_METHOD, charts, datasets, drawable
from benchmarks.report.site.pictures import pictures
from benchmarks.report.statistic import RANKED_BY
from benchmarks.report.tables import QUALITY, label, row_label
from benchmarks.report.tables.markdown import measured, number, sampling
from benchmarks.runtime.excerpt import Excerpt
from benchmarks.suite.record import FULL_PRECISION, STATUSES, Cell, Record, Value
from tfmq.precision import Precision

HERE = Path(__file__).parent
# Paths that are named of those that a reason keeps from being quantised; the record has all.
SHOWN_PATHS = 3
# A number that sorts behind all others.
LAST = 1e300
LEVEL_DIGITS = 4
ARROWS = {"lower": " ↓", "higher": " ↑", None: ""}
# The page is about numbers of one task first; a comparison over tasks is asked for.
FILTERS = {
    "task": "Task",
    "precision": "Precision",
    "protocol": "Protocol",
    "backend": "Backend",
    "method": "Method",
    "seed": "Calibration seed",
    "status": "Status",
}


@dataclass(frozen=True)
class Number:
    """A number in the table: what is shown, its interval, and what the column is sorted by.

    What is missing stands last, whichever side is the better one.
    """

    text: str
    interval: str
    order: float


def page(
    records: Sequence[Record],
    excerpts: Mapping[Cell, Excerpt],
    metrics: Mapping[str, Metric],
    levels: Mapping[Cell, Value],
    prompts: Mapping[str, Sequence[str]],
    latency: Sequence[Mapping],
    lines: Collection[Cell] = (),
) -> str:
    """The page `results/site/index.html` of all records, whatever their status.

    Args:
        records: of all cells, in the order of their tasks.
        excerpts: of each cell that has metrics.
        metrics: by name, in the order of their columns.
        levels: what the rows of quantised cells rank by, from `benchmarks.report.tables.levels`.
        prompts: of the images of each task that has any, in the order of the images.
        latency: the files of `results/latency`, parsed.
        lines: cells whose lines over steps are shown at first, before others are asked for; none means all.
    """
    tasks = list(dict.fromkeys(record.task for record in records))
    ordered = sorted(records, key=lambda record: _place(record, tasks, levels))
    columns = measured(metrics, ordered)
    titles = {name: _title(metric, ordered) for name, metric in columns.items()}
    drawn = drawable(ordered, columns)
    precisions = list(dict.fromkeys(sorted((record.precision for record in ordered), key=_bits)))
    shown = [record for record in ordered if record.metrics]
    quantized = [record for record in shown if record.method != FULL_PRECISION and record.seed == 0]
    quantized_at = [each for each in precisions if any(record.precision == each for record in quantized)]
    drawn_numbers = datasets(ordered, excerpts, drawn, latency)
    kinds = sorted({row["kind"] for row in drawn_numbers["cells"]})
    specs = charts(
        {name: titles[name] for name in drawn},
        drawn,
        quantized_at,
        drawn_numbers["engines"],
        kinds,
        sorted({row_label(record) for record in quantized if record.cell in lines}),
    )
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    return environment.get_template("page.html").render(
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup((HERE / "page.js").read_text(encoding="utf-8")),
        table_style=Markup(_bundle("dt_bundle.css").decode()),
        table_script=base64.b64encode(_bundle("dt_bundle.js")).decode(),
        chart_script=Markup(_inline(vl_convert.javascript_bundle())),
        charts=_json({"charts": specs, "datasets": drawn_numbers}),
        pictures=_json(pictures(ordered, excerpts, prompts)),
        picture_count=max((len(excerpts[record.cell].images) for record in shown), default=0),
        records=ordered,
        tasks={task: next(record for record in ordered if record.task == task) for task in tasks},
        statuses={status: sum(record.status == status for record in ordered) for status in STATUSES},
        ranked_by=RANKED_BY,
        levels={record.cell.name: _number(levels.get(record.cell), LEVEL_DIGITS) for record in ordered},
        numbers={record.cell.name: _numbers(record, columns) for record in ordered},
        titles=titles,
        metrics=columns,
        filters={name: (text, _values(name, ordered)) for name, text in FILTERS.items()},
        chart_tasks=list(dict.fromkeys(record.task for record in quantized)),
        chart_precisions=quantized_at,
        chart_metrics={name: titles[name] for name in sorted(drawn, key=lambda name: name != QUALITY)},
        chart_methods=sorted({label(record.method) for record in quantized}),
        no_method=NO_METHOD,
        latency={found["task"]: found for found in latency},
        libraries=_libraries(),
        full_precision=FULL_PRECISION,
        label=label,
        row_label=row_label,
        sampling=sampling,
        value=_value,
        shown_paths=SHOWN_PATHS,
        last=LAST,
    )


def _place(record: Record, tasks: Sequence[str], levels: Mapping[Cell, Value]) -> tuple[object, ...]:
    """A key to sort by: task, from many bits to few, seed, from near full precision to far."""
    value = levels.get(record.cell)
    distance = (value is None, value.value if value else 0.0)
    return tasks.index(record.task), *_bits(record.precision), record.seed, *distance, record.cell.name


def _bits(precision: str) -> tuple[int, int, str]:
    parsed = Precision.parse(precision)
    return -parsed.weight_bits, -parsed.activation_bits, precision


def _title(metric: Metric, records: Sequence[Record]) -> str:
    """A metric's heading over several tasks, without counts and CLIPs, in which these may differ."""
    tasks = [record.settings["task"] for record in records]
    distances = " / ".join(dict.fromkeys(extractor(task["evaluator"]).distance_label for task in tasks))
    text = metric.label.partition(" ({clips")[0]
    return text.format(distance=distances, count="", second="clean FID") + ARROWS[metric.better]


def _numbers(record: Record, columns: Mapping[str, Metric]) -> list[Number]:
    """The metrics of a record, column by column."""
    return [
        _number(record.metrics.get(name), metric.digits, -LAST if metric.better == "higher" else LAST)
        for name, metric in columns.items()
    ]


def _number(value: Value | None, digits: int, last: float = LAST) -> Number:
    if value is None:
        return Number("", "", last)
    text, _, interval = number(value, digits, interval=True).partition(" ")
    return Number(text, interval, value.value)


def _values(name: str, records: Sequence[Record]) -> list[str]:
    """The different values of a filter, as the table shows them."""
    texts = [label(record.method) if name == "method" else str(getattr(record, name)) for record in records]
    return sorted(set(texts)) if name == "method" else list(dict.fromkeys(texts))


def _value(value: object) -> str:
    """A setting as it would stand in params.yaml."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _json(content: object) -> Markup:
    """JSON that may stand in a script element."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    return Markup(text.replace("<", "\\u003c"))


def _inline(script: str) -> str:
    """A script that may stand in a script element: what would end or escape it is written differently in its texts."""
    return re.sub(r"<(?=!--|/?script)", r"\\x3c", script, flags=re.IGNORECASE)


def _bundle(name: str) -> bytes:
    """A file of DataTables as itables brings it."""
    return (resources("itables") / "html" / name).read_bytes()


def _libraries() -> list[dict[str, str]]:
    """What stands in the page beside this project's own code, with the texts of the licences that come with it."""
    found = (
        ("DataTables with jQuery", "MIT", "itables"),
        ("Vega, Vega-Lite and Vega-Embed", "BSD-3-Clause", "vl-convert-python"),
    )
    return [
        {"name": name, "licence": licence, "package": f"{package} {version(package)}", "text": _licence(package)}
        for name, licence, package in found
    ]


def _licence(package: str) -> str:
    listed = distribution(package).files or []
    return "\n\n".join(file.read_text() for file in sorted(listed) if file.name == "LICENSE")
