"""Whether intervals and verdicts hold what they promise, on rows whose truth is known.

Rows are drawn from the model of `benchmarks.report.inference`, and from others that break it: seeds that matter more
for some rows than for others, and values of images that are not normal. Each task has one precision with several seeds
and one with a single seed. `results/RANKING.md` has the outcome; `python -m benchmarks.report.simulation 2000` prints
that of more tasks.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from benchmarks.report.inference import LEVEL, Borrowed, Estimate, Parts, adjusted, borrow, estimate, over, parts_of
from benchmarks.report.words import line

TASKS = 500
# How many tasks a mean over tasks is of.
TOGETHER = 5
# How far apart rows are that may not be called equal, in standard deviations of an image.
MARGIN = 1.0


@dataclass(frozen=True)
class Scenario:
    """Rows of a task that are drawn at random.

    Attributes:
        text: what it is.
        seed: standard deviation of a calibration, in that of an image: the row's own error on the image.
        unequal: spread of the logarithm of ``seed`` over rows.
        both: standard deviation of calibration and image together, in that of an image.
        tail: degrees of freedom of Student's t that images and their interactions with seeds are drawn from; None of
            the normal distribution.
        rows, images, seeds: counts.
    """

    text: str
    seed: float
    unequal: float = 0.0
    both: float = 1.0
    tail: float | None = None
    rows: int = 8
    images: int = 96
    seeds: int = 3


SCENARIOS = (
    Scenario("Calibrations do not matter", 0.0),
    Scenario("They matter as much as 96 images do", 0.1),
    Scenario("They matter three times as much", 0.3),
    Scenario("Three times as much, and not alike for all rows", 0.3, unequal=1.0),
    Scenario("As much as 96 images do, not alike, heavy tails", 0.1, unequal=1.0, tail=3.0),
    Scenario("As much as 96 images do, and the same images go wrong at each seed", 0.1, both=0.3),
)


@dataclass(frozen=True)
class Coverage:
    """Of 95 % intervals, and of verdicts at a level of 5 %.

    The comparisons of three seeds and those of one are one family, as on the page of findings.

    Attributes:
        several, one, images_alone: shares of the true differences that intervals hold: with several seeds, with one,
            and over images alone.
        false_differences: share of tasks on which any two rows are called different that are not.
        false_equals: share of tasks on which any two rows are shown to be nearer than `MARGIN` that differ by it.
        false_littles: share of tasks on which any gain of `MARGIN` is shown to be less.
        differences_over, equals_over, littles_over: the same three of means over `TOGETHER` tasks, which borrow nothing
            and are of several seeds alone.
    """

    several: float
    one: float
    images_alone: float
    false_differences: float
    false_equals: float
    false_littles: float
    differences_over: float
    equals_over: float
    littles_over: float


def coverage(scenario: Scenario, tasks: int = TASKS) -> Coverage:
    """Coverage over all pairs of rows of so many tasks; the same numbers each time."""
    generator = np.random.default_rng(0)
    inside: list[tuple[bool, bool, bool]] = []
    estimates: list[list[Estimate]] = []
    own_seeds: list[list[Estimate]] = []
    means = MARGIN * (np.arange(scenario.rows) % 2)
    for _ in range(tasks):
        # Rows differ in how far they are from full precision, by some tenths.
        scale = np.exp(generator.normal(0, 0.3, scenario.rows))
        own = scale * scenario.seed * np.exp(generator.normal(0, scenario.unequal, scenario.rows))
        several = _draw(scenario, generator, means, scale, own, scenario.seeds)
        one = _draw(scenario, generator, means, scale, own, 1)
        pairs = list(combinations(range(scenario.rows), 2))
        parts = [parts_of(several[a] - several[b]) for a, b in pairs]
        borrowed = borrow(parts, scenario.rows - 1)
        singles = [parts_of(one[a] - one[b]) for a, b in pairs]
        estimates.append([estimate(part, borrowed) for part in (*parts, *singles)])
        own_seeds.append([estimate(part, Borrowed()) for part in parts])
        for (a, b), part, single in zip(pairs, parts, singles, strict=True):
            truth = means[a] - means[b]
            alone = 1.96 * (single.between_images / single.images) ** 0.5
            inside.append(
                (_holds(part, borrowed, truth), _holds(single, borrowed, truth), abs(single.mean - truth) <= alone)
            )
    truths = np.array([means[a] - means[b] for a, b in pairs])
    together = [
        [over(each) for each in zip(*own_seeds[first : first + TOGETHER], strict=True)]
        for first in range(0, tasks, TOGETHER)
    ]
    wrong = np.mean([_wrong(each, np.tile(truths, 2)) for each in estimates], axis=0)
    wrong_over = np.mean([_wrong(each, truths) for each in together], axis=0)
    return Coverage(*np.mean(inside, axis=0).tolist(), *wrong.tolist(), *wrong_over.tolist())


def table(scenarios: Sequence[Scenario] = SCENARIOS, tasks: int = TASKS) -> str:
    """Markdown of the coverage of each scenario."""
    heads = ["Scenario", "Three seeds", "One seed, borrowing", "One seed, over images alone"]
    kinds = ("different", "equal", "little")
    heads += [f"Falsely {kind}" for kind in kinds] + [f"Over {TOGETHER} tasks, falsely {kind}" for kind in kinds]
    rows = [line(heads), line([":--"] + (len(heads) - 1) * ["--:"])]
    for scenario in scenarios:
        found = coverage(scenario, tasks)
        rows.append(line([scenario.text, *(f"{share:.1%}" for share in dataclasses.astuple(found))]))
    return "\n".join(rows)


def _wrong(found: Sequence[Estimate], truths: np.ndarray) -> list[bool]:
    """Whether any of a family is falsely called different, equal, or without a gain of `MARGIN`."""
    different = np.array(adjusted([each.p for each in found])) < LEVEL
    near = np.array(adjusted([each.p_near(MARGIN) for each in found])) < LEVEL
    little = np.array(adjusted([each.p_above(-MARGIN) for each in found])) < LEVEL
    return [bool(each.any()) for each in (different & (truths == 0), near & (truths != 0), little & (truths < 0))]


def _draw(
    scenario: Scenario,
    generator: np.random.Generator,
    means: np.ndarray,
    scale: np.ndarray,
    own: np.ndarray,
    seeds: int,
) -> np.ndarray:
    """Values (rows, seeds, images)."""

    def errors(*shape: int) -> np.ndarray:
        if scenario.tail is None:
            return generator.normal(size=shape)
        deviation = (scenario.tail / (scenario.tail - 2)) ** 0.5
        return generator.standard_t(scenario.tail, shape) / deviation

    # What varies from image to image in all rows alike is not in a difference.
    common = 2 * errors(scenario.images)
    by_image = errors(scenario.rows, 1, scenario.images)
    by_both = scenario.both * errors(scenario.rows, seeds, scenario.images)
    by_seed = own[:, None, None] * generator.normal(size=(scenario.rows, seeds, 1))
    return means[:, None, None] + common + scale[:, None, None] * (by_image + by_both) + by_seed


def _holds(part: Parts, borrowed: object, truth: float) -> bool:
    found = estimate(part, borrowed)
    return found is not None and found.value.low <= truth <= found.value.high


if __name__ == "__main__":
    print(table(tasks=int(sys.argv[1]) if len(sys.argv) > 1 else TASKS))
