"""Where the recommended recipe stands: which rows it is ahead of on each task, which not, and at what size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.report.judge import Judge
from benchmarks.report.statistic import RANKED_BY
from benchmarks.report.tables.markdown import label
from benchmarks.report.words import line, named, ratio

TITLE = "Where the recommended recipe stands"
RECOMMENDED = "recommended"
# Rows of at most so many times the recipe's size count as of its size: scales of groups take up to 18 % more.
SAME_SIZE = 1.2
HEAD = ("Precision", "Task", "Ahead of", "Level with", "Behind", "Of its size")


@dataclass
class Standing:
    """The recipe at a precision of a task.

    Attributes:
        ahead: labels of rows that are worse.
        level, behind: of rows that are no different beyond chance, and that are better, with ratio and size.
        of_its_size: how many rows are of the recipe's size.
        unbeaten: labels of those among them that are not worse.
    """

    precision: str
    task: str
    ahead: list[str] = field(default_factory=list)
    level: list[str] = field(default_factory=list)
    behind: list[str] = field(default_factory=list)
    of_its_size: int = 0
    unbeaten: list[str] = field(default_factory=list)


def text(judges: Mapping[str, Judge], rows: Sequence[str]) -> str:
    """Markdown: a sentence for each precision, and the table behind it; empty where the recipe is not measured.

    ``rows`` are those that it is compared with.
    """
    found = [
        _standing(task, judge, precision, rows) for task, judge in judges.items() for precision in judge.precisions
    ]
    by_precision: dict[str, list[Standing]] = {}
    for standing in filter(None, found):
        by_precision.setdefault(standing.precision, []).append(standing)
    if not by_precision:
        return ""
    parts = [
        "The recommended recipe beside the other rows of the leaderboard and of newer methods, by the ratio of"
        " deviations (the other row's over its own, with the 95 % interval over images and seeds) and by size. *Ahead*"
        " and *behind* are beyond that interval, one comparison at a time; *level* rows are named where there are any."
        f" *Of its size*: whether it is ahead of all rows of at most {SAME_SIZE} times its size, where there are any."
    ]
    parts += [f"**{precision}.** {_sentence(every)}" for precision, every in by_precision.items()]
    lines = [line(HEAD), line([":--"] * len(HEAD))]
    lines += [line(_fields(standing)) for every in by_precision.values() for standing in every]
    return "\n\n".join([*parts, "\n".join(lines)])


def _standing(task: str, judge: Judge, precision: str, rows: Sequence[str]) -> Standing | None:
    if (RECOMMENDED, precision) not in judge.records:
        return None
    standing = Standing(precision, task)
    own = _size(judge, RECOMMENDED, precision)
    for row in rows:
        found = judge.compare(RANKED_BY.name, row, RECOMMENDED, precision)
        if found is None or found.estimate is None:
            continue
        size = _size(judge, row, precision) / own
        told = f"{label(row)} {ratio(found.estimate)}, {size:.2f} times its size"
        value = found.estimate.value
        if value.low > 0:
            standing.ahead.append(label(row))
        else:
            (standing.behind if value.high < 0 else standing.level).append(told)
        if size <= SAME_SIZE:
            standing.of_its_size += 1
            standing.unbeaten += [label(row)] * (value.low <= 0)
    return standing if standing.ahead or standing.level or standing.behind else None


def _sentence(every: Sequence[Standing]) -> str:
    first = [standing.task for standing in every if not standing.level and not standing.behind]
    of_its_size = [standing.task for standing in every if standing.of_its_size and not standing.unbeaten]
    count = f"{len(first)} of {len(every)} tasks"
    parts = [f"It is ahead of every other row on {count}{named(first)}."]
    if len(first) < len(every):
        parts.append(
            f"Of rows of its size it is ahead of all on {len(of_its_size)} of {len(every)}{named(of_its_size)}."
        )
    return " ".join(parts)


def _fields(standing: Standing) -> list[str]:
    count = len(standing.ahead) + len(standing.level) + len(standing.behind)
    of_its_size = (
        f"not of {'; '.join(standing.unbeaten)}" if standing.unbeaten else "yes" if standing.of_its_size else "–"
    )
    others = ("; ".join(rows) or "–" for rows in (standing.level, standing.behind))
    return [standing.precision, standing.task, f"{len(standing.ahead)} of {count}", *others, of_its_size]


def _size(judge: Judge, row: str, precision: str) -> float:
    """MiB of a row's network; every measured cell has its cost."""
    return next(iter(judge.records[row, precision].values())).cost.size_mib
