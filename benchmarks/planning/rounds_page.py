"""What verdicts will cost, and what FIDs, as a part of the plan's page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from benchmarks.planning.expected import REPLICATES, USUAL, Expected
from benchmarks.planning.planner import GIB, LEARNED, LEARNED_ON_GPU, Item
from benchmarks.report.tables.markdown import NOTHING
from benchmarks.suite.params import Suite
from benchmarks.suite.record import FULL_PRECISION

HOUR = 3600


@dataclass(frozen=True)
class Budget:
    """What a task takes, for verdicts and for FIDs.

    Attributes:
        verdicts: its steps, drawn in rounds until claims are decided.
        expected: how many images that takes.
        most: its steps, drawn to the last round in all cells.
        trajectories: bytes of an image's, which stay on the disk while there are rounds.
        reported: its steps, with all images of full precision and of the cells whose FID a paper reports.
        whole: its steps, with all images of all cells.
    """

    verdicts: Sequence[Item]
    expected: Expected
    most: Sequence[Item]
    trajectories: int
    reported: Sequence[Item]
    whole: Sequence[Item]


def part(budgets: Mapping[str, Budget], suite: Suite, donors: Sequence[str]) -> str:
    """Markdown: hours of verdicts and of FIDs by task, and what they are made of; ``donors`` are who lends effects."""
    numbers = {task: _numbers(found) for task, found in budgets.items()}
    summed = {name: sum(found[name] for found in numbers.values()) for name in next(iter(numbers.values()))}
    lines = []
    for task, found in [*numbers.items(), ("all tasks", summed)]:
        counts = suite.rounds.images.get(task)
        lines.append(
            {
                "Verdicts on": task,
                "Rounds": ", ".join(f"{count:,}" for count in counts) if counts else "",
                "Images a cell": f"{found['images'] / found['cells']:,.0f}" if found["cells"] else NOTHING,
                "Comparisons": f"{found['comparisons']:,.0f}",
                "Decided": f"{found['decided']:,.1f}",
                "Trajectories (GiB)": f"{found['trajectories'] / GIB:,.0f}",
                "Hours to verdicts": _hours(found["verdicts"]),
                "quantising": _hours(found["verdicts"] - found["drawing"]),
                "drawing": _hours(found["drawing"]),
                "at most": _hours(found["most"]),
                "Hours to reported FIDs": _hours(found["reported"]),
                "Hours to all FIDs": _hours(found["whole"]),
            }
        )
    align = ["left" if name in ("Verdicts on", "Rounds") else "right" for name in lines[0]]
    table = pd.DataFrame(lines).to_markdown(index=False, disable_numparse=True, colalign=align)
    return f"## Verdicts and FIDs\n\n{_introduction(suite.equal_within, donors)}\n\n{table}"


def _numbers(found: Budget) -> dict[str, float]:
    images = {cell: count for cell, count in found.expected.images.items() if cell.method != FULL_PRECISION}
    (full,) = (count for cell, count in found.expected.images.items() if cell.method == FULL_PRECISION)
    return {
        "images": sum(images.values()),
        "cells": len(images),
        "comparisons": found.expected.comparisons,
        "decided": found.expected.after[-1],
        "trajectories": found.trajectories * full,
        "verdicts": sum(item.seconds for item in found.verdicts),
        "drawing": sum(item.drawing for item in found.verdicts),
        "most": sum(item.seconds for item in found.most),
        "reported": sum(item.seconds for item in found.reported),
        "whole": sum(item.seconds for item in found.whole),
    }


def _introduction(equal_within: float, donors: Sequence[str]) -> str:
    if donors:
        assumed = (
            f"how many images that takes is expected from the effects on {', '.join(donors)} in the small suite: each"
            f" plays a task's rounds {REPLICATES} times, with true differences and images drawn as they were measured"
            " there, and all of them count alike. Where one has no such rows, another's stand in, or those at"
            f" {USUAL}. That the papers' models have effects of such sizes is an assumption"
        )
    else:
        assumed = "no results of the small suite are here to expect effects from, so that every cell takes all rounds"
    margin = f" or shown to be nearer than {equal_within:.0%}" if equal_within else ""
    return (
        "*Verdicts*: `python -m benchmarks rounds --task TASK --draw` draws cells in rounds until each claim is"
        f" confirmed, contradicted{margin}; {assumed}. Each of these images is drawn by the quantised network and has"
        " its errors measured along full precision's trajectory, two evaluations a step. *Decided* are so many of the"
        " comparisons in the mean, and the last round leaves the others open; *at most* is what it takes if every cell"
        " comes to that. *Reported FIDs*: all images of full precision and of the cells whose FID a paper reports,"
        " without rounds before; *all FIDs*: of all cells. In each of these, what cells learn alike is learned once. A"
        f" row that is learned on counts {LEARNED_ON_GPU:g} evaluations on a GPU and {LEARNED:g} on a CPU."
    )


def _hours(seconds: float) -> str:
    return f"{seconds / HOUR:,.1f}"
