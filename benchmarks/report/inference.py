"""How sure a mean over images and calibration seeds is: pure functions of arrays.

All cells of a task denoise the same noise, so images are crossed with seeds: y[s, i] = mean + a[s] + b[i] + e[s, i],
with a of the calibration, b of the image and e of both. The variance of the mean over S seeds and N images is
var(a) / S + var(b) / N + var(e) / (S N), and its unbiased estimate has the mean squares of the two-way layout without
repetition (Searle, Casella and McCulloch, Variance Components, 1992, chapter 4). Degrees of freedom are Satterthwaite's
(1946, Biometrics Bulletin 2, eq. 17).

Three seeds say little of a variance over seeds: its two degrees of freedom alone would take intervals 4.3 standard
errors wide. What comparisons of one task have in common is learned from all of them, as Smyth does for genes (2004,
Statistical Applications in Genetics and Molecular Biology 3, article 3, section 6.2): the ratio of the variance over
seeds to that over images is drawn from a scaled inverse chi-squared distribution, whose scale and degrees of freedom
are fitted to the ratios of all comparisons. It is the ratio and not the variance since rows that are nearly the same
network differ little from image to image, and little from seed to seed too. Where a comparison has one seed, what was
fitted stands for its own variance; the noise that seeds are scored on never varies, so images are all that replicates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import digamma, polygamma, stdtr, stdtrit

from benchmarks.suite.record import Value

LEVEL = 0.05
# The chance with which a planned comparison should be decided, and how many seeds and images are thought of.
POWER = 0.8
MOST_SEEDS, MOST_IMAGES = 50, 100_000
# Fewer comparisons than this say nothing of how ratios are distributed.
FEWEST = 3
# Variances below this share of the others are rounding: of rows that draw nothing while they are calibrated, say.
ROUNDING = 1e-12


@dataclass(frozen=True)
class Parts:
    """Mean squares of the values of one comparison, or one row, over its seeds and images.

    Attributes:
        mean: over all values.
        seeds, images: their counts; 0 images where a seed has one value that no image enters.
        between_seeds: variance of the means of the seeds, an estimate of var(a) + var(e) / N; None of one seed.
        between_images: variance of the means of the images over the seeds, of var(b) + var(e) / S.
        within_seed: variance over the images of one seed, of var(b) + var(e); 1 without images.
        both: of var(e); None of one seed.
    """

    mean: float
    seeds: int
    images: int
    between_seeds: float | None
    between_images: float
    within_seed: float
    both: float | None

    @property
    def unit(self) -> float:
        """What the variance between seeds is measured in: the variance that images alone give the mean of one seed."""
        return self.within_seed / self.images if self.images else 1.0

    @property
    def ratio(self) -> float | None:
        """Variance between seeds in units; None of one seed, and where nothing varies."""
        if self.between_seeds is None or self.between_seeds <= ROUNDING * self.unit:
            return None
        return self.between_seeds / self.unit


@dataclass(frozen=True)
class Borrowed:
    """What comparisons of a task have in common.

    Attributes:
        ratio: of the variance between seeds to its unit.
        degrees: how many degrees of freedom this is worth; 0 where there was nothing to learn from.
        both: share of var(e) in the variance over the images of one seed.
    """

    ratio: float = 0.0
    degrees: float = 0.0
    both: float = 0.0


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error and degrees of freedom."""

    mean: float
    error: float
    degrees: float
    images: int
    seeds: int

    @property
    def p(self) -> float:
        """Two-sided probability of a mean so far from 0 where the truth is 0."""
        if self.error == 0:
            return 1.0 if self.mean == 0 else 0.0
        return float(2 * stdtr(self.degrees, -abs(self.mean) / self.error))

    def p_near(self, margin: float) -> float:
        """One-sided probability of a mean so near to 0 where the truth is ``margin`` or further off.

        The larger one of two one-sided tests (Schuirmann, 1987, Journal of Pharmacokinetics and Biopharmaceutics 15).
        """
        room = margin - abs(self.mean)
        if room <= 0:
            return 0.5
        return float(stdtr(self.degrees, -room / self.error)) if self.error else 0.0

    def p_above(self, bound: float) -> float:
        """One-sided probability of a mean so far above ``bound`` where the truth is ``bound`` or less."""
        if self.error == 0:
            return float(self.mean <= bound)
        return float(stdtr(self.degrees, (bound - self.mean) / self.error))

    @property
    def value(self) -> Value:
        """The mean with its 95 % interval."""
        margin = float(stdtrit(self.degrees, 1 - LEVEL / 2)) * self.error if self.error else 0.0
        return Value(self.mean, self.mean - margin, self.mean + margin, max(self.images, 1))


def parts_of(values: np.ndarray) -> Parts:
    """Mean squares of values (S, N) of seeds and images, or (S,) of seeds that have one value each.

    Raises ValueError for a single image: it has no variance.
    """
    count = len(values)
    if values.ndim == 1:
        between = float(values.var(ddof=1)) if count > 1 else None
        return Parts(float(values.mean()), count, 0, between, 0.0, 1.0, None)
    images = values.shape[1]
    if images < 2:
        raise ValueError(f"values have the shape {values.shape}: an interval takes two or more images")
    by_seed, by_image, mean = values.mean(1), values.mean(0), float(values.mean())
    within = float(values.var(axis=1, ddof=1).mean())
    between_images = float(by_image.var(ddof=1))
    if count == 1:
        return Parts(mean, 1, images, None, between_images, within, None)
    rest = values - by_seed[:, None] - by_image + mean
    both = float((rest**2).sum() / ((count - 1) * (images - 1)))
    return Parts(mean, count, images, float(by_seed.var(ddof=1)), between_images, within, both)


def borrow(comparisons: Sequence[Parts], independent: int) -> Borrowed:
    """Fit the ratios of comparisons that have equally many seeds, of which so many are ``independent``.

    The logarithm of a ratio has the mean log(ratio) + digamma(s/2) - log(s/2) - digamma(d/2) + log(d/2) and the
    variance trigamma(s/2) + trigamma(d/2), with s its own degrees of freedom and d those looked for (Smyth, 2004,
    section 6.2). Pairs of n rows repeat what the rows say, n - 1 times, so d is at most what the mean logarithm of as
    many ratios is known to: trigamma(d/2) = trigamma(s/2) / independent.
    """
    found = [part for part in comparisons if part.ratio is not None]
    if len(found) < FEWEST:
        return Borrowed()
    own = found[0].seeds - 1
    logarithms = np.log([part.ratio for part in found]) - digamma(own / 2) + np.log(own / 2)
    mean, spread = float(logarithms.mean()), float(logarithms.var(ddof=1) - polygamma(1, own / 2))
    least = float(polygamma(1, own / 2)) / max(independent, 1)
    degrees = 2 * _trigamma_inverse(max(spread, least))
    # Where ratios differ by no more than chance, they are one number.
    ratio = float(np.exp(mean + (digamma(degrees / 2) - np.log(degrees / 2)) * (spread > least)))
    shares = [part.both / part.within_seed for part in found if part.both is not None]
    return Borrowed(ratio, degrees, float(np.mean(shares)) if shares else 0.0)


def estimate(part: Parts, borrowed: Borrowed) -> Estimate | None:
    """The mean of a comparison, or of a row, with the error that its seeds and images leave.

    None where nothing says how it varies: one seed without images, and nothing borrowed. Differences that are 0 at all
    of several seeds are of one network, which no other calibration would tell apart.
    """
    seed, degrees, both = _seed_variance(part, borrowed)
    if not part.images and part.mean == 0 and part.between_seeds == 0:
        return Estimate(0.0, 0.0, 1.0, 0, part.seeds)
    if part.images == 0:
        if degrees == 0:
            return None
        return Estimate(part.mean, (seed / part.seeds) ** 0.5, degrees, 0, part.seeds)
    from_images = part.between_images / part.images
    from_seeds = max(seed - both / part.images, 0.0) / part.seeds
    total = from_images + from_seeds
    lost = from_images**2 / (part.images - 1)
    if degrees:
        lost += (seed / part.seeds) ** 2 / degrees
    if part.both is not None:
        lost += (both / part.images / part.seeds) ** 2 / ((part.images - 1) * (part.seeds - 1))
    # Of nothing but zeros, any count of degrees of freedom will do.
    return Estimate(part.mean, total**0.5, total**2 / lost if lost else part.images - 1.0, part.images, part.seeds)


def over(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of means whose errors are independent, such as those of several tasks, each as much as the others.

    Its variance is the sum of theirs by the square of their number, with Satterthwaite's degrees of freedom.
    """
    variances = np.array([each.error**2 for each in estimates])
    total = float(variances.sum())
    lost = sum(variance**2 / each.degrees for variance, each in zip(variances, estimates, strict=True))
    return Estimate(
        mean=float(np.mean([each.mean for each in estimates])),
        error=total**0.5 / len(estimates),
        degrees=total**2 / lost if lost else 1.0,
        images=sum(each.images for each in estimates),
        seeds=min(each.seeds for each in estimates),
    )


def adjusted(probabilities: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted probabilities: those below a level are false with at most that chance, all together."""
    p = np.asarray(probabilities, float)
    order = np.argsort(p)
    found = np.empty_like(p)
    found[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1)
    return found.tolist()


def needed(
    part: Parts,
    borrowed: Borrowed,
    level: float,
    margin: float = 0.0,
    above_level: float = LEVEL,
) -> tuple[int, int] | None:
    """Seeds and images that would decide a comparison with the chance `POWER`.

    It is decided by a difference, at a two-sided ``level``, or by showing that it is above -``margin``, at the
    one-sided ``above_level``, which takes less than showing that it is within the margin. The effect is taken to be the
    observed one, and variances as estimated. Neither count falls below what there is, and seeds times images is
    smallest. None where `MOST_SEEDS` and `MOST_IMAGES` would not do, where there is neither an effect nor a margin, and
    where nothing says how the comparison varies.
    """
    seed, degrees, both = _seed_variance(part, borrowed)
    if not part.images and not degrees:
        return None
    images = max(part.images, 1)
    of_seed = max(seed - both / images, 0.0) if part.images else seed
    of_image = max(part.between_images - both / part.seeds, 0.0)
    before = max(degrees - (part.seeds - 1), 0.0)

    def decided(seeds: int, count: int) -> bool:
        from_seeds, from_images = of_seed / seeds, (of_image + both / seeds) / count
        total = from_seeds + from_images
        lost = from_images**2 / max(count - 1, 1) if part.images else 0.0
        free = before + seeds - 1
        if from_seeds and not free:
            return False
        lost += ((of_seed + both / count) / seeds) ** 2 / free if free else 0.0
        if not lost:
            return part.mean != 0 or margin > 0
        freedom, error = total**2 / lost, total**0.5
        if abs(part.mean) / error >= stdtrit(freedom, [1 - level / 2, POWER]).sum():
            return True
        return margin > 0 and (part.mean + margin) / error >= stdtrit(freedom, [1 - above_level, POWER]).sum()

    plans = []
    for seeds in range(part.seeds, MOST_SEEDS + 1):
        low, high = images, MOST_IMAGES if part.images else images
        if not decided(seeds, high):
            continue
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if decided(seeds, middle) else (middle + 1, high)
        plans.append((seeds * low, seeds, low))
        if low == images:
            break
    return min(plans)[1:] if plans else None


def _seed_variance(part: Parts, borrowed: Borrowed) -> tuple[float, float, float]:
    """Variance between seeds, from the comparison's own and what is borrowed; its degrees of freedom; and var(e)."""
    own = part.seeds - 1
    degrees = borrowed.degrees + own
    both = part.both if part.both is not None else borrowed.both * part.within_seed * (part.images > 0)
    if degrees == 0:
        return 0.0, 0.0, 0.0
    variance = borrowed.degrees * borrowed.ratio * part.unit + own * (part.between_seeds or 0.0)
    return variance / degrees, degrees, both


def _trigamma_inverse(value: float) -> float:
    """x with trigamma(x) = value; trigamma falls from infinity to 0."""
    return float(np.exp(brentq(lambda x: float(polygamma(1, np.exp(x))) - value, -20, 20)))
