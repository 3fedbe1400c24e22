"""The first images of every row as pictures for the page, with what is told of each. Nothing here touches files."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from benchmarks.report.tables import QUALITY, row_label
from benchmarks.runtime.excerpt import Excerpt
from benchmarks.suite.record import FULL_PRECISION, Cell, Record

# What a picture is told with: its own distance to the full-precision picture of the same noise.
DIGITS = 3


def pictures(
    records: Sequence[Record], excerpts: Mapping[Cell, Excerpt], prompts: Mapping[str, Sequence[str]]
) -> dict[str, object]:
    """What the page needs to lay the pictures of any two rows of a task beside each other, as JSON.

    ``tasks`` has for each task the ``prompts`` of its pictures and its rows by precision, full precision first in each;
    ``rows`` has for each row by its cell's name its label, the name of its strip, and the feature distance of each
    picture; ``strips`` are the pictures of a row side by side as lossless WebP in base64, each different one once.
    Rows are those of seed 0 that have an excerpt.
    """
    found = [record for record in records if record.seed == 0 and record.cell in excerpts]
    # What a leaderboard ranks comes first, other protocols and backends after it.
    shown = sorted(found, key=lambda record: record.cell.row != record.method)
    tasks: dict[str, dict[str, object]] = {}
    rows: dict[str, dict[str, object]] = {}
    strips: dict[str, str] = {}
    for record in shown:
        excerpt = excerpts[record.cell]
        name, strip = _strip(excerpt.images)
        strips[name] = strip
        distances = excerpt.values.get(QUALITY, np.array([]))[: len(excerpt.images)]
        rows[record.cell.name] = {
            "label": row_label(record),
            "strip": name,
            "count": len(excerpt.images),
            "distances": [f"{float(distance):.{DIGITS}f}" for distance in distances],
        }
    for task in dict.fromkeys(record.task for record in shown):
        full = [record.cell.name for record in shown if record.task == task and record.method == FULL_PRECISION]
        precisions: dict[str, list[str]] = {}
        for record in shown:
            if record.task == task and record.method != FULL_PRECISION:
                precisions.setdefault(record.precision, list(full)).append(record.cell.name)
        tasks[task] = {"prompts": list(prompts.get(task, ())), "precisions": precisions or {"w32a32": full}}
    return {"tasks": tasks, "rows": rows, "strips": strips}


def _strip(images: np.ndarray) -> tuple[str, str]:
    """Images uint8 (N, 3, H, W) side by side: a name that is the hash of the pixels, and lossless WebP in base64."""
    pixels = np.concatenate(images.transpose(0, 2, 3, 1), axis=1)
    name = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()[:16]
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="webp", lossless=True, quality=75, method=4)
    return name, base64.b64encode(buffer.getvalue()).decode()
