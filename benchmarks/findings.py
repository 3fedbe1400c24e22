"""What the papers claim, and what the records say of it: `results/FINDINGS.md`. Nothing here touches files.

A claim says that one row is better than another by one metric. At each precision it holds where the better row's 95 %
interval lies entirely on the better side of the other's, is contradicted where it lies entirely on the other side, and
is open where the two overlap. Both rows denoise the same noise, so this is cautious: overlapping intervals may still
hide a difference; and it does not correct for the number of claims.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.metrics import Metric
from benchmarks.record import Record, Value
from benchmarks.tables import label

VERDICTS = ("holds", "contradicted", "open")
HEADINGS = {"holds": "What holds", "contradicted": "What does not hold", "open": "What the intervals leave open"}
HEAD = "| Claim | By | Precision | Metric | Should be better | Than |\n|:--|:--|:--|:--|:--|:--|"
QUALITY = "feature_distance"


@dataclass(frozen=True)
class Claim:
    """``better`` is better than ``worse`` by ``metric``.

    Rows are named as in the records' folders: a method, or ``<method>-published``. ``source`` says who claims it, or
    that it is asked here.
    """

    text: str
    source: str
    better: str
    worse: str
    metric: str = QUALITY


TFMQ, POSTER, JOURNAL = "TFMQ-DM", "TFMQ-DM, poster", "Temporal Feature Matters"
ASKED = "asked here"
CLAIMS = (
    Claim("Keeping temporal features beats Q-Diffusion", TFMQ, "tfmq", "qdiffusion"),
    Claim("Keeping temporal features beats PTQD", TFMQ, "tfmq", "ptqd"),
    Claim("Keeping temporal features beats PTQ4DM", TFMQ, "tfmq", "ptq4dm"),
    Claim("It lowers the temporal-feature error", TFMQ, "tfmq", "qdiffusion", "temporal_error"),
    Claim("Freezing temporal layers beats reconstructing projections with their blocks", POSTER, "freeze", "prev"),
    Claim("Its reconstruction alone (TIAR) improves the base", TFMQ, "tiar", "prev"),
    Claim("Its calibration alone (FSC) improves the base", TFMQ, "fsc", "prev"),
    Claim("Both together improve on TIAR alone", TFMQ, "tfmq", "tiar"),
    Claim("Both together improve on FSC alone", TFMQ, "tfmq", "fsc"),
    Claim(
        "Exact temporal features improve the base: there is something to gain", ASKED, "full_precision_temporal", "prev"
    ),
    Claim("Exact temporal features would improve TFMQ-DM further", ASKED, "full_precision_temporal", "tfmq"),
    Claim("Scales per step everywhere, as in the code, improve TFMQ-DM", ASKED, "tfmq_per_step", "tfmq"),
    Claim("Scales per step everywhere improve Q-Diffusion", ASKED, "qdiffusion_per_step", "qdiffusion"),
    Claim(
        "With scales per step everywhere, TFMQ-DM still beats Q-Diffusion",
        ASKED,
        "tfmq_per_step",
        "qdiffusion_per_step",
    ),
    Claim("Finite-set calibration improves Q-Diffusion", ASKED, "qdiffusion_temporal", "qdiffusion"),
    Claim("Cache and selection improve TFMQ-DM", JOURNAL, "temporal_feature_matters", "tfmq"),
    Claim("They lower the temporal-feature error", JOURNAL, "temporal_feature_matters", "tfmq", "temporal_error"),
    Claim("The cache alone improves the base", JOURNAL, "cache", "prev"),
    Claim("Reconstruction beats rounding to nearest", "Q-Diffusion", "qdiffusion", "nearest"),
    Claim("Q-Diffusion beats PTQ4DM", "Q-Diffusion", "qdiffusion", "ptq4dm"),
    Claim("Normally distributed time steps need their own latents", ASKED, "ptq4dm", "ptq4dm_mispaired"),
    Claim("PTQ4DM beats plain rounding to nearest", "PTQ4DM", "ptq4dm", "nearest"),
    Claim("Correcting the noise beats Q-Diffusion", "PTQD", "ptqd", "qdiffusion"),
    Claim("Mixed precision costs quality", ASKED, "ptqd", "ptqd_mixed"),
    Claim("Step sizes that follow the time step beat PTQ4DM", "TDQ", "tdq", "ptq4dm"),
    Claim("They beat plain static ranges", "TDQ", "tdq", "nearest"),
    Claim("Training beats calibrating", "TDQ", "tdq_qat", "tdq"),
    Claim("Groups and dynamic ranges beat plain rounding to nearest", "Q-DiT, ViDiT-Q", "groupwise", "nearest"),
    Claim("Groups and dynamic ranges beat TFMQ-DM", ASKED, "groupwise", "tfmq"),
    Claim("A low-rank branch improves on groups and dynamic ranges", "SVDQuant", "svdquant", "groupwise"),
    Claim("A low-rank branch beats TFMQ-DM", ASKED, "svdquant", "tfmq"),
    Claim("Its own choice of layers flatters TFMQ-DM", ASKED, "tfmq-published", "tfmq"),
    Claim("Its own choice of layers flatters Q-Diffusion", ASKED, "qdiffusion-published", "qdiffusion"),
    Claim("Its own choice of layers flatters PTQD", ASKED, "ptqd-published", "ptqd"),
    Claim("Its own choice of layers flatters TDQ", ASKED, "tdq-published", "tdq"),
    Claim("Its own choice of layers flatters PTQ4DM", ASKED, "ptq4dm-published", "ptq4dm"),
    Claim(
        "With each its own choice of layers, TFMQ-DM beats Q-Diffusion", TFMQ, "tfmq-published", "qdiffusion-published"
    ),
)


def verdict(better: Value, worse: Value, direction: str) -> str:
    """``holds``, ``contradicted`` or ``open``; ``direction`` says whether ``lower`` or ``higher`` values are better."""
    if direction == "higher":
        better, worse = worse, better
    return "holds" if better.high < worse.low else "contradicted" if better.low > worse.high else "open"


def page(records: Sequence[Record], metrics: Mapping[str, Metric], claims: Sequence[Claim] = CLAIMS) -> str:
    """Markdown: for each task, every claim with its two rows' values under the verdict."""
    parts = [
        "# Findings\n\nGenerated by the `tables` stage from the records; do not edit. A claim **holds** at a precision"
        " where the 95 % interval of the row that should be better lies entirely on the better side of the other row's,"
        " **does not hold** where it lies entirely on the other side, and is **open** where they overlap. That is"
        " cautious, for all rows denoise the same noise; it is also uncorrected for the number of claims. The"
        " temporal-feature error has no interval, since nothing in it is drawn. What is found here is found on small"
        " models, at one seed, with few iterations; it says nothing yet of the models of the papers."
    ]
    for task in dict.fromkeys(record.task for record in records):
        cells = {(r.cell.row, r.precision): r for r in records if r.task == task and r.status == "measured"}
        lines: dict[str, list[str]] = {name: [] for name in VERDICTS}
        for claim in claims:
            for precision in dict.fromkeys(precision for _, precision in cells):
                pair = [cells.get((row, precision)) for row in (claim.better, claim.worse)]
                if all(record is not None and claim.metric in record.metrics for record in pair):
                    better, worse = (record.metrics[claim.metric] for record in pair)
                    found = verdict(better, worse, metrics[claim.metric].better)
                    lines[found].append(_line(claim, precision, metrics[claim.metric].label, better, worse))
        counts = ", ".join(f"{len(lines[name])} {name}" for name in VERDICTS)
        parts.append(f"## {task}\n\nOf {sum(map(len, lines.values()))} comparisons: {counts}.")
        for name in VERDICTS:
            body = "\n".join([HEAD, *lines[name]]) if lines[name] else "None."
            parts.append(f"### {HEADINGS[name]}\n\n{body}")
    return "\n\n".join(parts) + "\n"


def _line(claim: Claim, precision: str, metric: str, better: Value, worse: Value) -> str:
    shown = f"{_label(claim.better)} {_value(better)} | {_label(claim.worse)} {_value(worse)}"
    return f"| {claim.text} | {claim.source} | {precision} | {metric} | {shown} |"


def _label(row: str) -> str:
    method, _, protocol = row.partition("-")
    return label(method) + (f" ({protocol})" if protocol else "")


def _value(value: Value) -> str:
    # An error of rounding alone is none.
    text, low, high = (f"{0 if abs(end) < 1e-12 else end:.3g}" for end in (value.value, value.low, value.high))
    return text if low == high else f"{text} [{low}, {high}]"
