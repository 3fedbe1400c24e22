"""How candidates for the ranking statistic do on the records: `results/RANKING.md`. Nothing here touches files.

Each candidate takes the same four tests. None of them asks which method is best.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from statistics import mean

import numpy as np
from scipy.stats import f_oneway, rankdata, spearmanr

from benchmarks.metrics import Metric
from benchmarks.report.statistic import IMAGE_METRICS, Statistic, Values
from benchmarks.suite.record import FULL_PRECISION, SHARED, SIMULATED, Cell, Record
from tfmq.precision import Precision

# Images of a block: an order that must come out has to come out of as few.
BLOCK = 16
# Fewer rows than this have no order to speak of.
FEWEST = 4
HALVES = (slice(None, None, 2), slice(1, None, 2))


@dataclass(frozen=True)
class Known:
    """Two rows whose order is known before anything is measured, up to so many bits of weights."""

    better: str
    worse: str
    why: str
    bits: int = 8


KNOWN = (
    Known("ptqd", "ptqd_mixed", "fewer bits at some steps"),
    Known("ptq4dm", "ptq4dm_mispaired", "calibrated on latents of other steps"),
    Known("svdquant", "groupwise", "the same grids without a branch in 16 bits"),
    Known("qdiffusion", "nearest", "0 iterations of learning roundings against 400", bits=4),
    Known("autoround", "nearest", "0 iterations of learning roundings against 400", bits=4),
)


@dataclass(frozen=True)
class Outcome:
    """How a candidate does, by task.

    Attributes:
        ordered: pairs of cells and blocks of images in the known order, and of how many.
        separation: F, the variance between rows over that between calibration seeds, geometric mean over precisions.
        spread: standard deviation over seeds, relative: the median over rows, the mean over precisions.
        repeats: correlation of the order of rows on half of the images at one seed with that on the others at another.
        agrees: correlation of the order on half of the images with that of image metrics on the others.
    """

    ordered: dict[str, tuple[int, int]] = field(default_factory=dict)
    separation: dict[str, float] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)
    repeats: dict[str, float] = field(default_factory=dict)
    agrees: dict[str, float] = field(default_factory=dict)

    def scores(self, tasks: Sequence[str]) -> tuple[float | None, ...]:
        """Of the four tests over some tasks, larger is better: share ordered, log F, repeats, agrees."""
        right, of = (sum(self.ordered.get(task, (0, 0))[index] for task in tasks) for index in (0, 1))
        separation, repeats, agrees = (
            [found[task] for task in tasks if task in found] for found in (self.separation, self.repeats, self.agrees)
        )
        return (
            right / of if of else None,
            float(np.mean(np.log(separation))) if separation else None,
            mean(repeats) if repeats else None,
            mean(agrees) if agrees else None,
        )


class Evidence:
    """The measured, quantised cells of all tasks and what their images have."""

    def __init__(self, records: Sequence[Record], values: Mapping[Cell, Values], metrics: Mapping[str, Metric]) -> None:
        found = [r for r in records if r.status == "measured" and r.method != FULL_PRECISION and r.cell in values]
        self.records = {record.cell: record for record in found}
        self.values, self.metrics = values, metrics
        self._scores: dict[tuple[Statistic, Cell], np.ndarray | None] = {}
        self.tasks = list(dict.fromkeys(cell.task for cell in self.records))

    def of(self, statistic: Statistic, cell: Cell, images: slice = slice(None)) -> float | None:
        """The number of a cell."""
        if (statistic, cell) not in self._scores:
            self._scores[statistic, cell] = statistic.of_images(self.values[cell], self.metrics)
        return statistic.of(self.records[cell], self._scores[statistic, cell], self.metrics, images)

    def rows(self, task: str) -> dict[str, dict[int, list[Cell]]]:
        """Cells of methods as all tables have them: precision -> seed -> cells."""
        found: dict[str, dict[int, list[Cell]]] = {}
        for cell in self.records:
            if (cell.task, cell.protocol, cell.backend) == (task, SHARED, SIMULATED):
                found.setdefault(cell.precision, {}).setdefault(cell.seed, []).append(cell)
        return found

    def seeded(self, task: str) -> dict[str, list[list[Cell]]]:
        """The cells of each row that has several seeds and draws anything, by precision, where there are enough rows.

        A row whose seeds give the same images draws nothing while it is calibrated.
        """
        found: dict[str, list[list[Cell]]] = {}
        for precision, seeds in self.rows(task).items():
            cells = [[cell for at in seeds.values() for cell in at if cell.method == row] for row in _methods(seeds)]
            cells = [sorted(row, key=lambda cell: cell.seed) for row in cells if len(row) > 1]
            most = max((len(row) for row in cells), default=0)
            cells = [row for row in cells if len(row) == most and not self._equal(row)]
            if len(cells) >= FEWEST:
                found[precision] = cells
        return found

    def _equal(self, row: Sequence[Cell]) -> bool:
        first, *others = (self.values[cell] for cell in row)
        return all(np.array_equal(first[name], other.get(name)) for other in others for name in first)

    def images(self, task: str) -> int:
        """The fewest images that any metric of a task has."""
        return min(len(v) for c in self.records if c.task == task for v in self.values[c].values())


def outcome(statistic: Statistic, evidence: Evidence) -> Outcome:
    """All tests of one candidate."""
    found = Outcome()
    for task in evidence.tasks:
        found.ordered[task] = _ordered(statistic, evidence, task)
        separations, spreads = [], []
        for rows in evidence.seeded(task).values():
            numbers = [[evidence.of(statistic, cell) for cell in row] for row in rows]
            if not any(number is None for row in numbers for number in row):
                separations.append(float(f_oneway(*numbers).statistic))
                spreads.append(float(np.median([np.std(row, ddof=1) for row in numbers])))
        if separations:
            found.separation[task] = float(np.exp(np.mean(np.log(separations))))
            found.spread[task] = mean(spreads)
        for name, test in (("repeats", _repeats), ("agrees", _agrees)):
            correlation = test(statistic, evidence, task)
            if correlation is not None:
                getattr(found, name)[task] = correlation
    return found


def places(outcomes: Mapping[str, Outcome], tasks: Sequence[str]) -> dict[str, float]:
    """Mean rank over the tests of each candidate that all could be put to, 1 is best; equal ones share theirs."""
    scores = {name: found.scores(tasks) for name, found in outcomes.items()}
    kept = [index for index in range(4) if any(score[index] is not None for score in scores.values())]
    complete = {name: s for name, s in scores.items() if kept and all(s[index] is not None for index in kept)}
    ranks = [rankdata([-score[index] for score in complete.values()]) for index in kept]
    return dict(zip(complete, np.mean(ranks, axis=0).tolist(), strict=True)) if complete else {}


def known_order(cells: Sequence[Cell]) -> Iterator[tuple[Cell, Cell]]:
    """Pairs of cells of a task, the better one first: of more bits, all else equal, or of `KNOWN`.

    Of precisions that follow one another only neighbours are compared, since the others are easier.
    """
    present = set(cells)
    for cell in cells:
        own = [c.precision for c in present if _at(c, "") == _at(cell, "")]
        for other in own:
            if _more(other, cell.precision) and not any(
                _more(other, middle) and _more(middle, cell.precision) for middle in own
            ):
                yield _at(cell, other), cell
        for known in KNOWN:
            better = Cell(cell.task, known.better, cell.precision, cell.seed, cell.protocol, cell.backend)
            few = Precision.parse(cell.precision).weight_bits <= known.bits
            if cell.method == known.worse and few and better in present:
                yield better, cell


def _more(precision: str, other: str) -> bool:
    """Whether a precision has more bits than another one, and nowhere fewer."""
    a, b = Precision.parse(precision), Precision.parse(other)
    return a != b and a.weight_bits >= b.weight_bits and a.activation_bits >= b.activation_bits


def _at(cell: Cell, precision: str) -> Cell:
    return Cell(cell.task, cell.method, precision, cell.seed, cell.protocol, cell.backend)


def _methods(seeds: Mapping[int, Sequence[Cell]]) -> list[str]:
    return list(dict.fromkeys(cell.method for cells in seeds.values() for cell in cells))


def _ordered(statistic: Statistic, evidence: Evidence, task: str) -> tuple[int, int]:
    cells = [cell for cell in evidence.records if cell.task == task]
    blocks = [slice(i, i + BLOCK) for i in range(0, evidence.images(task) - BLOCK + 1, BLOCK)] or [slice(None)]
    if statistic.location is None:
        blocks = [slice(None)]
    right = of = 0
    for better, worse in known_order(cells):
        for block in blocks:
            pair = [evidence.of(statistic, cell, block) for cell in (better, worse)]
            if None not in pair:
                right, of = right + (pair[0] < pair[1]), of + 1
    return right, of


def _repeats(statistic: Statistic, evidence: Evidence, task: str) -> float | None:
    if statistic.location is None:
        return None
    found = []
    for rows in evidence.seeded(task).values():
        for one, other in permutations(range(len(rows[0])), 2):
            orders = [
                [evidence.of(statistic, row[seed], half) for row in rows]
                for seed, half in zip((one, other), HALVES, strict=True)
            ]
            found.append(correlation(*orders))
    return _mean(found)


def _agrees(statistic: Statistic, evidence: Evidence, task: str) -> float | None:
    """Mean over precisions, seeds, halves and image metrics; to each of these the candidate is put without it."""
    if statistic.location is None:
        return None
    found = []
    for name in IMAGE_METRICS:
        rest = tuple(part for part in statistic.metrics if part != name)
        judged = dataclasses.replace(statistic, metrics=rest)
        sign = -1 if evidence.metrics[name].better == "higher" else 1
        for seeds in evidence.rows(task).values():
            for cells in seeds.values():
                cells = [cell for cell in cells if name in evidence.values[cell]]
                if not rest or len(cells) < FEWEST:
                    continue
                for own, unseen in (HALVES, HALVES[::-1]):
                    order = [evidence.of(judged, cell, own) for cell in cells]
                    of_images = [sign * float(evidence.values[cell][name][unseen].mean()) for cell in cells]
                    found.append(correlation(order, of_images))
    return _mean(found)


def correlation(order: Sequence[float | None], other: Sequence[float | None]) -> float | None:
    """Spearman's, of two numbers of each row; None where one is missing, or all are equal."""
    if None in order or None in other or len(set(order)) < 2 or len(set(other)) < 2:
        return None
    return float(spearmanr(order, other).statistic)


def _mean(found: Sequence[float | None]) -> float | None:
    kept = [value for value in found if value is not None]
    return mean(kept) if kept else None
