"""How many images verdicts will take, from effects that were measured elsewhere. Nothing here touches files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.metrics import Metric
from benchmarks.report.findings import CLAIMS
from benchmarks.report.inference import LEVEL
from benchmarks.report.judge import judges_of
from benchmarks.report.rounds import asked
from benchmarks.report.sequential import decided
from benchmarks.report.statistic import RANKED_BY, Values
from benchmarks.suite.params import Suite
from benchmarks.suite.record import FULL_PRECISION, Cell, Record

REPLICATES = 200
# Whose effects stand in where a precision was not measured.
USUAL = "w4a8"


@dataclass(frozen=True)
class Effect:
    """The logarithm of the ratio of two rows' errors: its mean over images, and its standard deviation between them."""

    mean: float
    deviation: float
    images: int


# By task, and then by the better and the worse row and the precision.
Effects = Mapping[str, Mapping[tuple[str, str, str], Effect]]


@dataclass(frozen=True)
class Expected:
    """What is expected of a task in rounds, as means over what may happen.

    Attributes:
        images: of each cell, full precision among them.
        comparisons: how many are to be decided.
        after: how many of them are decided after each round.
    """

    images: dict[Cell, float]
    comparisons: int
    after: tuple[float, ...]


def effects(
    records: Sequence[Record], values: Mapping[Cell, Values], metrics: Mapping[str, Metric]
) -> dict[str, dict[tuple[str, str, str], Effect]]:
    """The effects of all claims that images decide, by task."""
    found: dict[str, dict[tuple[str, str, str], Effect]] = {}
    for task, judge in judges_of(records, values, metrics).items():
        for claim in CLAIMS:
            for precision in judge.precisions if claim.metric == RANKED_BY.name else ():
                compared = judge.compare(claim.metric, claim.better, claim.worse, precision)
                if compared is not None:
                    part = compared.parts
                    effect = Effect(part.mean, part.within_seed**0.5, part.images)
                    found.setdefault(task, {})[claim.better, claim.worse, precision] = effect
    return found


def expect(
    suite: Suite, task: str, known: Effects, without: Sequence[Cell] = (), replicates: int = REPLICATES
) -> Expected:
    """The images that the rounds of a task will take, if its effects are those of one of the tasks of ``known``.

    Each of these tasks is played so many times: true differences are drawn about the measured ones, as far as those are
    known, images about the truth, and after each round decides what decides in a run (`benchmarks.report.rounds`).
    Where a task has no rows like those of a claim, another's stand in, or those at `USUAL`; a claim that has none
    anywhere is decided by no round. ``without`` are cells that are not applicable.
    """
    counts, missing = np.array(suite.rounds.images[task]), set(without)
    family = [each for each in asked(suite, task) if not missing & set(each[2])]
    cells = [cell for cell in suite.cells() if cell.task == task and cell not in missing]
    generator = np.random.default_rng(0)
    reached, done = np.zeros(len(cells)), np.zeros(len(counts))
    for donor in known if family else ():
        measured = [_effect(known, donor, claim.better, claim.worse, precision) for claim, precision, _ in family]
        open_after = _play(measured, counts, suite, replicates, generator)
        done += (len(family) - open_after.sum(1).mean(0)) / len(known)
        reached += _images(cells, family, counts, open_after).mean(0) / len(known)
    if not known:
        reached = np.full(len(cells), float(counts[-1]))
    return Expected(dict(zip(cells, reached.tolist(), strict=True)), len(family), tuple(done.tolist()))


def _effect(known: Effects, donor: str, better: str, worse: str, precision: str) -> Effect | None:
    for at in (precision, USUAL):
        for task in (donor, *known):
            if (better, worse, at) in known[task]:
                return known[task][better, worse, at]
    return None


def _play(
    measured: Sequence[Effect | None],
    counts: np.ndarray,
    suite: Suite,
    replicates: int,
    generator: np.random.Generator,
) -> np.ndarray:
    """Which comparisons are open (R, M, K) after each of the K rounds."""
    mean, deviation, error = np.array(
        [[np.nan] * 3 if e is None else (e.mean, e.deviation, e.deviation / e.images**0.5) for e in measured]
    ).T
    truth = mean + error * generator.normal(size=(replicates, len(measured)))
    steps = np.diff(counts, prepend=0)
    motion = (generator.normal(size=(replicates, len(measured), len(counts))) * steps**0.5).cumsum(2)
    found = truth[:, :, None] + deviation[:, None] * motion / counts
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = counts**0.5 / deviation[:, None]
        differ = np.nan_to_num(np.abs(found) * scale, nan=0.0)
        near = np.nan_to_num((np.log1p(suite.equal_within) - np.abs(found)) * scale, nan=-np.inf)
    fractions = (counts / counts[-1]).tolist()
    open_after = np.zeros(found.shape, dtype=bool)
    for look in range(1, len(counts) + 1):
        said = decided(differ[:, :, :look], fractions, LEVEL, suite.rounds.spending)
        # One-sided, so at twice the level.
        said |= decided(near[:, :, :look], fractions, 2 * LEVEL, suite.rounds.spending)
        open_after[:, :, look - 1] = ~said
    return open_after


def _images(
    cells: Sequence[Cell],
    family: Sequence[tuple[object, str, tuple[Cell, ...]]],
    counts: np.ndarray,
    open_after: np.ndarray,
) -> np.ndarray:
    """Images of each cell (R, cells)."""
    rounds = np.ones((len(open_after), len(cells)), dtype=int)
    for index, (_, _, own) in enumerate(family):
        going = open_after[:, index, :-1].cumprod(1).sum(1) + 1
        for cell in own:
            place = cells.index(cell)
            rounds[:, place] = np.maximum(rounds[:, place], going)
    full = [place for place, cell in enumerate(cells) if cell.method == FULL_PRECISION]
    rounds[:, full] = rounds.max(1, keepdims=True)
    return counts[rounds - 1]
