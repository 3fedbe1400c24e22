"""Looking at growing samples without losing the level: pure functions of numbers.

A comparison whose images are drawn in rounds is tested after each round. Tested anew at 5 % each time, it would be
found to differ by chance in more than 5 % of cases. A group-sequential test spends its level over the looks instead:
with the information fraction t, the share of all images that are there, f(t) of the level has been spent, where f is
chosen beforehand (Lan and DeMets, 1983, Biometrika 70). The statistic Z at t, times the root of t, is Brownian motion,
so the chance of crossing a boundary for the first time at a look is an integral over where the motion was at the look
before (Armitage, McPherson and Rowe, 1969, JRSS A 132; Jennison and Turnbull, Group Sequential Methods, 2000, chapter
19). The level holds wherever the looks end, so that a comparison may also stop for a reason that is none of its own.

The smallest level at which any look so far would have decided is a probability like that of a single test. Holm's
method takes several of these as it takes others, and what it has decided at one round stays decided (Maurer and Bretz,
2013, Statistics in Biopharmaceutical Research 5, section 2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import e, log, log1p

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri

# Points of an integral over one look, and how many standard deviations of the motion it reaches. Critical values are at
# most `FARTHEST`.
POINTS, REACH, FARTHEST = 256, 9.0, 40.0
# Probabilities are told from others down to this.
SMALLEST = 1e-12


def _pocock(fraction: float, level: float) -> float:
    """Spend like Pocock's boundaries: some at every look, so that early ones can decide."""
    return level * log1p((e - 1) * fraction)


def _obrien_fleming(fraction: float, level: float) -> float:
    """Spend like O'Brien and Fleming's boundaries, half of the level on each side: next to nothing at early looks."""
    return float(4 * ndtr(ndtri(level / 4) / fraction**0.5))


SPENDINGS: dict[str, Callable[[float, float], float]] = {"pocock": _pocock, "obrien_fleming": _obrien_fleming}


def critical_values(fractions: Sequence[float], level: float, spending: str) -> list[float]:
    """Two-sided critical values of Z at each look, for a test at ``level`` with a ``spending`` of `SPENDINGS`.

    ``fractions`` of the information rise to at most 1. Raises ValueError where they do not, and for another level.
    """
    if not fractions or not all(a < b for a, b in zip([0.0, *fractions], [*fractions, np.inf], strict=True)):
        raise ValueError(f"information fractions are {list(fractions)}: give rising ones above 0")
    if fractions[-1] > 1 + 1e-9:
        raise ValueError(f"the last information fraction is {fractions[-1]:g}, but must be at most 1")
    if not 0 < level < 1:
        raise ValueError(f"the level is {level:g}, but must be between 0 and 1")
    return list(_critical_values(tuple(fractions), level, spending))


@lru_cache(maxsize=4096)
def _critical_values(fractions: tuple[float, ...], level: float, spending: str) -> tuple[float, ...]:
    spend = SPENDINGS[spending]
    nodes, weights = np.polynomial.legendre.leggauss(POINTS)
    # Where the motion is at the look before, and the chance that it is there and has crossed nothing.
    where, mass = np.zeros(1), np.ones(1)
    values, spent, before = [], 0.0, 0.0
    for fraction in fractions:
        now, step = min(spend(min(fraction, 1.0), level), level), (fraction - before) ** 0.5
        bound = _bound(where, mass, step, now - spent, FARTHEST * fraction**0.5)
        values.append(bound / fraction**0.5)
        half = min(bound, REACH * fraction**0.5)
        points = half * nodes
        density = np.exp(-(((points[:, None] - where) / step) ** 2) / 2) @ mass / (step * (2 * np.pi) ** 0.5)
        where, mass, spent, before = points, density * weights * half, now, fraction
    return tuple(values)


def _bound(where: np.ndarray, mass: np.ndarray, step: float, chance: float, farthest: float) -> float:
    """The bound that motion from ``where`` is beyond with a ``chance``, after a step of that standard deviation."""

    def excess(bound: float) -> float:
        return float(mass @ (ndtr((where - bound) / step) + ndtr((-where - bound) / step))) - chance

    if chance <= 0 or excess(farthest) >= 0:
        return farthest
    return float(brentq(excess, 0.0, farthest, xtol=1e-12))


def sequential_p(probabilities: Sequence[float], fractions: Sequence[float], spending: str) -> float:
    """The smallest level at which a test would have decided at one of its looks so far.

    ``probabilities`` are two-sided, of each look by itself. Where there is nothing but chance, the result is below a
    level with at most that chance, at whichever look it is read.
    """
    found = 1.0
    for look, probability in enumerate(probabilities, 1):
        found = min(found, _level(probability, fractions[:look], found, spending))
    return found


def _level(probability: float, fractions: Sequence[float], highest: float, spending: str) -> float:
    """The level whose boundary at the last of ``fractions`` is just met; ``highest`` where it takes a higher one."""
    statistic = -float(ndtri(max(probability, 1e-300) / 2))

    def beyond(logarithm: float) -> float:
        return critical_values(fractions, np.exp(logarithm), spending)[-1] - statistic

    low, high = log(SMALLEST), log(min(highest, 0.999))
    if high <= low or beyond(low) <= 0:
        return SMALLEST
    return highest if beyond(high) >= 0 else float(np.exp(brentq(beyond, low, high, xtol=1e-5)))


def decided(statistics: np.ndarray, fractions: Sequence[float], level: float, spending: str) -> np.ndarray:
    """Which comparisons (R, M) Holm's method decides by their statistics (R, M, K) after K looks; of R families of M.

    These are the comparisons whose `sequential_p`, corrected for the M of a family, is below ``level``: the same for
    many families at once, where one statistic at a look that is large enough decides.
    """
    _, count, looks = statistics.shape
    bounds = np.array([critical_values(fractions[:looks], level / left, spending) for left in range(1, count + 1)])
    found = np.zeros(statistics.shape[:2], dtype=bool)
    while True:
        left = np.maximum(count - found.sum(1), 1)
        now = (statistics >= bounds[left - 1][:, None, :]).any(2)
        if (now == found).all():
            return found
        found = now
