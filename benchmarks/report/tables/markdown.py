"""The Markdown of one task's table: its caption, its headings, its numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, stdev

import pandas as pd

from benchmarks.features import extractor
from benchmarks.metrics import Metric
from benchmarks.report.statistic import RANKED_BY
from benchmarks.report.tables.comparison import QUALITY, Standing
from benchmarks.suite import discover
from benchmarks.suite.fields import read
from benchmarks.suite.outcome import TensorFloat32
from benchmarks.suite.record import FULL_PRECISION, SHARED, SIMULATED, Cell, Record, Value
from benchmarks.suite.tasks import WITH_ETA

NOTHING = "–"
# Decimals of the ranking statistic.
STANDING_DIGITS = 4
SCHEDULERS = {"ddim": "DDIM", "ddim_quad": "DDIM (quadratic)", "pndm": "PNDM", "euler": "Euler"}
# Columns of the summary, and all columns of text.
PLACES = ("First", "Second", "Third")
LEFT = ("Precision", "Method", *PLACES, "Its own protocol", "Note")
SHARED_TEXT = (
    "Protocol `shared`: every method quantises the same layers (all Conv2d and Linear at the stated bits, the first and"
    " last layer at 8 bits, attention products and softmax at the activation bits)."
)
SEEDS_TEXT = (
    "*Over N seeds* is the mean and standard deviation of the feature distance over calibration seeds: other"
    " calibration images and other draws while quantising, the same noise scored. Ranks, and the deviation that they"
    " are by, are over all seeds; all other numbers are of seed 0."
)


def caption(records: Sequence[Record]) -> str:
    """What the numbers of one task's table are: version, settings, counts, evaluator, what was simulated and where."""
    first = records[0]
    task = first.settings["task"]
    costs = [record.cost for record in records if record.cost is not None]
    devices = sorted({cost.device for cost in costs})
    executions = sorted({cost.execution for cost in costs})
    count = task["reference_images"]
    others = f"{count} of its samples from other seeds, or, for paired columns," if count else "for paired columns,"
    sentences = [
        f"Version {first.task_version}.",
        *([SHARED_TEXT] if all(record.protocol == SHARED for record in records) else []),
        sampling(task),
        f"FP is the full-precision model: {others} its sample from the same noise.",
        f"Evaluator `{task['evaluator']}`; brackets are 95 % intervals.",
    ]
    sentences += tensor_float32(records)
    if task.get("prompts"):
        sentences.append(f"Images follow the lines of `{task['prompts']}/evaluation.txt` in turn.")
    if task.get("clip"):
        sentences.append(
            "The CLIP score is 100 x the cosine of image and prompt, mean over images, by a CLIP that no model here was"
            " trained with; its heading names the CLIP and the SHA-256 of its weights."
        )
        sentences += [
            f"{found['images']} real images that no model was trained on score {found['score']:.1f} with their captions"
            f" by {found['clip']}."
            for found in _clip_of_data(records)
        ]
    if any(record.seed for record in records):
        sentences.append(SEEDS_TEXT)
    if executions == [SIMULATED]:
        sentences.append("Low-bit arithmetic is simulated (fake-quantised), so no number here is a speed-up.")
    if devices:
        sentences.append(
            f"Quantisation time is wall time on {', '.join(devices)}, of one thread where that is a CPU, and includes"
            " recording the calibration pool."
        )
    return " ".join(sentences)


def sampling(task: Mapping[str, object]) -> str:
    """How the images of a task are drawn, from its settings: a sentence."""
    eta = f" eta {task['eta']:g}," if task["scheduler"] in WITH_ETA else ""
    return (
        f"{task['images']} images a cell at {task['resolution']} x {task['resolution']},"
        f" {task['steps']} {SCHEDULERS[task['scheduler']]} steps,{eta} guidance {task['guidance_scale']:g};"
        f" calibrated on {task['calibration_images']} images."
    )


def tensor_float32(records: Sequence[Record]) -> list[str]:
    """How far full precision is from float32, where a task lets it be drawn in TF32: a sentence, or none."""
    full = next((record for record in records if "tf32" in record.details), None)
    if full is None or full.cost is None:
        return []
    found = read(TensorFloat32, full.details["tf32"], "tf32")
    if not found.images:
        return [f"Full precision may be drawn in TF32, which {full.cost.device} does not have: it is in float32."]
    distance = found.feature_distance
    features = "" if distance is None else f", and its feature distance is {number(distance, 6, interval=True)}"
    return [
        f"Full precision is drawn in TF32. From itself in float32, on the noise of the first {found.images} images, its"
        f" latents differ by {found.mean:.2g} of their norm in the mean and by {found.largest:.2g} at most{features}."
        " That much of what divides quantised images from it, which are drawn in float32, is TF32's."
    ]


def cells_table(
    records: Sequence[Record],
    metrics: Mapping[str, Metric],
    intervals: Sequence[str],
    cost: bool,
    standing: Mapping[Cell, Standing] | None = None,
    rank: bool = False,
) -> str:
    """The rows of one task, those of seed 0, with the metrics that any of them has and the spread over the seeds.

    Before them stands the ranking statistic, where ``standing`` has it, and the rank if that is asked for.
    """
    standing = standing or {}
    shown = [record for record in records if record.seed == 0]
    columns = measured(metrics, shown)
    quantized = [record for record in shown if record.method != FULL_PRECISION]
    axes = [axis for axis in ("protocol", "backend") if len({getattr(record, axis) for record in quantized}) > 1]
    over_seeds: dict[tuple[str, str], list[float]] = {}
    for record in records:
        if QUALITY in record.metrics:
            over_seeds.setdefault((record.cell.row, record.precision), []).append(record.metrics[QUALITY].value)
    counts = sorted({len(values) for values in over_seeds.values()} - {1})
    rows = []
    for record in shown:
        told = [] if record.method == FULL_PRECISION else [getattr(record, axis) for axis in axes]
        row = {"Precision": record.precision, "Method": _with(label(record.method), told)}
        own = standing.get(record.cell)
        if rank:
            row["Rank"] = NOTHING if own is None else str(own.rank)
        if standing:
            row[f"{RANKED_BY.label} ↓"] = number(None if own is None else own.value, STANDING_DIGITS, interval=True)
        for name, metric in columns.items():
            row[heading(metric, records)] = number(record.metrics.get(name), metric.digits, name in intervals)
        for count in counts:
            values = over_seeds.get((record.cell.row, record.precision), [])
            row[f"Over {count} seeds"] = _spread(values, metrics[QUALITY].digits) if len(values) == count else NOTHING
        if cost:
            row["Quantisation time"] = duration(record)
            row["Network (MiB)"] = NOTHING if record.cost is None else f"{record.cost.size_mib:.2f}"
        rows.append(row | {"Note": note(record)})
    return table(rows)


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Markdown of some rows, without the column of notes where there is none."""
    frame = pd.DataFrame(rows)
    if "Note" in frame and (frame["Note"] == "").all():
        frame = frame.drop(columns="Note")
    align = ["left" if column in LEFT else "right" for column in frame]
    return frame.to_markdown(index=False, disable_numparse=True, colalign=align)


def measured(metrics: Mapping[str, Metric], records: Sequence[Record]) -> dict[str, Metric]:
    """The metrics that any of the records has."""
    return {name: metric for name, metric in metrics.items() if any(name in record.metrics for record in records)}


def heading(metric: Metric, records: Sequence[Record]) -> str:
    """A metric's title over the records of one task, with an arrow to its better side."""
    task = records[0].settings["task"]
    clips = next((record.settings["clip"] for record in records if record.settings.get("clip")), ())
    real = {found["clip"]: f"; real images {found['score']:.1f}" for found in _clip_of_data(records)}
    clips = [clip + real.get(clip, "") for clip in clips]
    second = [extractor(task["second_evaluator"]).distance_label] if task.get("second_evaluator") else []
    title = metric.title(extractor(task["evaluator"]).distance_label, task["images"], clips, *second)
    return title + {"lower": " ↓", "higher": " ↑", None: ""}[metric.better]


def _clip_of_data(records: Sequence[Record]) -> list[dict[str, object]]:
    """What each CLIP says of real images, where the records of a task know it."""
    references = (record.settings.get("reference", {}) for record in records)
    return next((reference["clip"] for reference in references if "clip" in reference), [])


def note(record: Record) -> str:
    """Why a cell was not measured."""
    return "" if record.status == "measured" else f"{record.status}: {record.reason}".replace("|", "\\|")


def label(method: str) -> str:
    """A method's name in tables and figures: its file's label; a method that has no file any more goes by its name."""
    if method == FULL_PRECISION:
        return "Full precision"
    return discover.method(method).label if method in discover.names(discover.METHODS) else method


def row_label(record: Record) -> str:
    """A method's name, with its protocol where that is not the shared one, and its backend where not simulated."""
    usual = {"protocol": SHARED, "backend": SIMULATED}
    told = [getattr(record, axis) for axis in usual if getattr(record, axis) != usual[axis]]
    return _with(label(record.method), told)


def _with(name: str, told: Sequence[str]) -> str:
    return f"{name} ({', '.join(told)})" if told else name


def number(value: Value | None, digits: int, interval: bool) -> str:
    """A value with so many decimals, and its interval where that is asked for and has a width."""
    if value is None:
        return NOTHING
    text = f"{value.value:z.{digits}f}"
    shown = interval and value.low < value.high
    return f"{text} [{value.low:z.{digits}f}, {value.high:z.{digits}f}]" if shown else text


def _spread(values: Sequence[float], digits: int) -> str:
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def duration(record: Record) -> str:
    """How long quantising took, in seconds, minutes or hours."""
    if record.cost is None or record.method == FULL_PRECISION:
        return NOTHING
    seconds = record.cost.quantization_seconds
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
