"""Does a cell that was made anew agree with its committed record?

On the record's kind of processor with its versions all has to be equal, bit for bit. Elsewhere sums are rounded in
another order, the rounding of a weight or an activation falls the other way, and sampling amplifies it; there a metric
may differ by a multiple of its interval's half width.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Literal

from benchmarks.suite.record import Record, Value

# What has to be the same for bits to be. Records from before `instructions` was one of them count as of another place.
PLACE = ("system", "cpu", "instructions", "gpu", "cuda", "python", "versions")
# Elsewhere a metric may differ by so many half widths of its committed interval, or by so much of its value where that
# is more. What was seen on emoji-ldm4 at w4a8, as the largest difference of any metric in half widths, from records of
# torch 2.15, one thread and batches of 64:
#
#                            full precision   round-to-nearest   SVDQuant   TFMQ-DM
#   torch 2.14               0                0                  0          0
#   torch 2.11, 2.12, 2.13   0.01             0.41               1.00       1.80
#   two threads              0.000002         0.000001           0.000003   0.000002
#   batches of 32            0.01             0.51               0.99       1.35
#
# Versions 2.11 to 2.13 give equal numbers, and two threads equal images. What learns differs most: its roundings end
# elsewhere, as they do with another calibration seed. Temporal errors, which have no interval, were equal everywhere;
# on another processor (Intel Xeon with AMX, records of AMD EPYC) TFMQ-DM's was 1.3 % off.
#
# Two calibration seeds of one row (165 pairs in the committed records) stay within 1.5 half widths in 95 of 100 cases
# for every metric with an interval but recall, with 6.5: its interval is over the data's 7,572 images, and counts
# nothing of what other images of the model would change. It is widened to what it would be over as many images as the
# cell has; the 6.5 are 0.7 then.
OF_INTERVAL = 2.0
OF_VALUE = 0.02

Verdict = Literal["identical", "agrees", "differs", "no committed record"]


@dataclass(frozen=True)
class Agreement:
    """How a record compares with the committed one, with a line for each thing that differs by more than is allowed.

    ``largest`` is the largest difference of a metric, as a share of what is allowed.
    """

    verdict: Verdict
    lines: tuple[str, ...] = ()
    largest: float = 0.0

    @property
    def text(self) -> str:
        """The verdict in a few words."""
        if self.verdict != "agrees":
            return self.verdict
        return f"agrees, {self.largest:.2g} of what is allowed"


def compare(committed: Record | None, remade: Record) -> Agreement:
    """Compare the record of a cell that was reproduced with the committed one."""
    if committed is None:
        return Agreement("no committed record")
    lines = _settings(committed, remade)
    if lines:
        return Agreement("differs", tuple(lines))
    identical = _lines(committed, remade, exact=True)
    images = _images(committed)
    shares = (_share(value, remade.metrics.get(name), images) for name, value in committed.metrics.items())
    largest = max(shares, default=0)
    if not identical:
        return Agreement("identical")
    if same_place(committed, remade):
        return Agreement("differs", tuple(identical), largest)
    lines = _lines(committed, remade, exact=False)
    return Agreement("differs" if lines else "agrees", tuple(lines), largest)


def same_place(one: Record, other: Record) -> bool:
    """Whether two records were made on the same kind of processor with the same versions."""
    return all(one.environment.get(key) == other.environment.get(key) for key in PLACE)


def _settings(committed: Record, remade: Record) -> list[str]:
    """Settings that are others than those of the committed record: its numbers are then of something else."""
    lines = []
    if committed.task_version != remade.task_version:
        lines.append(f"task version: committed {committed.task_version}, now {remade.task_version}")
    for part in ("task", "method"):
        old, new = committed.settings.get(part, {}), remade.settings.get(part, {})
        old, new = ({key: _plain(value) for key, value in settings.items()} for settings in (old, new))
        keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        lines += [f"{part} setting {key}: committed {old.get(key)}, now {new.get(key)}" for key in keys]
    return lines


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _lines(committed: Record, remade: Record, exact: bool) -> list[str]:
    """What differs: of the facts that no rounding changes, of the images where bits count, and of the metrics."""
    old, new, images = _facts(committed), _facts(remade), _images(committed)
    if exact:
        old, new = old | {"images": committed.inputs.get("images")}, new | {"images": remade.inputs.get("images")}
    lines = [f"{key}: committed {old[key]}, this run {new[key]}" for key in old if old[key] != new[key]]
    for name in {**committed.metrics, **remade.metrics}:
        mine, yours = committed.metrics.get(name), remade.metrics.get(name)
        if mine is None or yours is None:
            lines.append(f"{name}: {'not committed' if mine is None else 'not in this run'}")
        elif exact:
            old, new = asdict(mine), asdict(yours)
            field = next((field for field in old if old[field] != new[field]), None)
            if field is not None:
                lines.append(f"{name} ({field}): committed {old[field]!r}, this run {new[field]!r}")
        elif mine.n != yours.n or abs(mine.value - yours.value) > allowed(mine, images):
            lines.append(
                f"{name}: committed {mine.value:.6g} (n {mine.n}), this run {yours.value:.6g} (n {yours.n}), allowed"
                f" ± {allowed(mine, images):.2g}"
            )
    return lines


def _facts(record: Record) -> dict[str, object]:
    cost = record.cost
    return {
        "status": record.status,
        "reason": record.reason,
        "layers": record.coverage.get("layers"),
        "UNet evaluations": cost and cost.unet_evaluations,
        "optimiser steps": cost and cost.optimizer_steps,
        "size": cost and cost.size_mib,
    }


def _images(record: Record) -> int:
    """How many images a cell has."""
    return int(record.settings["task"]["images"])


def allowed(value: Value, images: int) -> float:
    """By how much a metric of a cell of so many images may differ where processor or versions do."""
    half = (value.high - value.low) / 2 * math.sqrt(max(1, value.n / images))
    return max(OF_INTERVAL * half, OF_VALUE * abs(value.value))


def _share(mine: Value, yours: Value | None, images: int) -> float:
    if yours is None or mine.value == yours.value:
        return 0.0
    most = allowed(mine, images)
    return abs(mine.value - yours.value) / most if most else math.inf
