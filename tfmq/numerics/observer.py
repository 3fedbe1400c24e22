"""Choosing the range [low, high] that a grid spans: min-max, searches of the smallest error, running average.

"Rows" are the slices that share a scale: one row for a per-tensor scale, one an output channel for weights.
All functions take a matrix of shape (rows, elements) and return tensors of shape (rows,).
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from tfmq.numerics.affine import SMALLEST_SCALE, Grid, affine_from_range, dequantize, quantize
from tfmq.numerics.finite import extremes

SEARCH_CANDIDATES = 80
SEARCH_NORM = 2.4
THRESHOLDS = 100
HISTOGRAM_BINS = 2**13


def minmax(rows: Tensor, bits: int, symmetric: bool = False) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each row's range, extended to contain 0."""
    low = rows.amin(1).clamp_max(0)
    high = rows.amax(1).clamp_min(0)
    return affine_from_range(low, high, bits, symmetric)


def search(
    rows: Tensor, bits: int, symmetric: bool = False, positive: bool = False, counts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each row with the smallest mean |x - x_hat|^2.4 among 80 shrunken ranges.

    Candidate i spans both ends of [min, max] times (1 - 0.01 i), i = 0..79, as in BRECQ, Q-Diffusion and TFMQ-DM. The
    ends are not extended to contain 0. ``positive`` fixes the lower end and the zero point at 0 (softmax output).
    ``counts`` says how often each element counts; None: once.
    Vectorised over rows and candidates; candidates are taken in chunks. An all-zero row keeps the smallest scale. Ties
    keep the widest range.
    """
    low = torch.zeros_like(rows[:, 0]) if positive else rows.amin(1)
    high = rows.amax(1)
    shrink = 1 - 0.01 * torch.arange(SEARCH_CANDIDATES, dtype=torch.float64, device=rows.device)
    lows = (shrink[:, None] * low.double()).to(rows.dtype)
    highs = (shrink[:, None] * high.double()).to(rows.dtype)
    scales, zero_points = affine_from_range(lows, highs, bits, symmetric)
    grid = Grid.signed(bits) if symmetric else Grid.unsigned(bits)
    chunk = _chunk(rows, SEARCH_CANDIDATES)
    errors = torch.cat(
        [
            _search_error(rows, counts, scales[i : i + chunk, :, None], zero_points[i : i + chunk, :, None], grid)
            for i in range(0, SEARCH_CANDIDATES, chunk)
        ]
    )
    best = errors.argmin(0, keepdim=True)
    return scales.gather(0, best)[0], zero_points.gather(0, best)[0]


def _chunk(rows: Tensor, most: int) -> int:
    """How many candidates to try at once: on a CPU as many as stay in its cache, 1 MiB, else near 64 MiB."""
    size = 2**20 if rows.device.type == "cpu" else 2**26
    return min(max(1, size // rows.nbytes), most)


def _search_error(rows: Tensor, counts: Tensor | None, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """Mean of |x - x_hat|^2.4 over each row's elements."""
    error = dequantize(quantize(rows, scale, zero_point, grid), scale, zero_point).sub_(rows).abs_().pow_(SEARCH_NORM)
    return error.mean(-1) if counts is None else error.mul_(counts).sum(-1) / counts.sum(-1)


def thresholds(rows: Tensor, bits: int, symmetric: bool = False) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each row by PTQ4DM's search (arXiv 2211.15736, released code).

    Of the ranges [-c M / 100, c M / 100], c = 1..100, M the row's largest magnitude, the one with the smallest mean
    |x - x_hat|^2.4, the narrowest of equal ones. Where ``rows`` as a whole have one sign, the other half of the range
    is cut. Codes are unsigned and 0 is one of them. A two-sided range lies half-way between two zero points, and the
    rounding of its end in float32 decides which it is; operations are in the released code's order. ``symmetric`` takes
    the signed grid with zero point 0 instead, whatever the signs.
    """
    _, scale, zero_point = _best_threshold(rows, None, rows.abs().amax(1), bits, Side.of(rows), symmetric)
    return scale, zero_point


class Side(Enum):
    """The signs that a tensor takes, as the multiples of the threshold that its range spans."""

    POSITIVE = (0, 1)
    NEGATIVE = (-1, 0)
    BOTH = (-1, 1)

    @classmethod
    def of(cls, x: Tensor) -> Side:
        low, high = extremes(x)
        if low >= 0:
            return cls.POSITIVE
        return cls.NEGATIVE if high <= 0 else cls.BOTH

    def ends(self, threshold: Tensor) -> tuple[Tensor, Tensor]:
        """The range that a threshold spans."""
        low, high = (multiple * threshold for multiple in self.value)
        return low, high


def _affine_of_ends(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a range on the unsigned grid, as PTQ4DM's released code rounds them in float32.

    On the signed grid where ``symmetric``, which that code does not have.
    """
    if symmetric:
        return affine_from_range(low, high, bits, symmetric)
    last = 2**bits - 1
    scale = ((high - low) / last).clamp_min(SMALLEST_SCALE)
    return scale, (-torch.round(low / scale)).clamp(0, last) + 0.0  # and no -0.0


def _best_threshold(
    rows: Tensor, counts: Tensor | None, largest: Tensor, bits: int, side: Side, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Threshold, scale and zero point (rows,) of the search; ``largest`` (rows,) is M, ``counts`` as in ``search``.

    It goes from the widest range to narrower ones, and stops where what is cut off alone costs more than the best range
    in all: no narrower one can win. A two-sided grid has one code more on one side of 0, so that it reaches half a step
    beyond the threshold there; a signed one, a whole step.
    """
    reach = 1 + 1 / (2 ** (bits - 1) - 1) if symmetric else 1 + (side is Side.BOTH) / (2**bits - 1)
    grid = Grid.signed(bits) if symmetric else Grid.unsigned(bits)
    best = [
        torch.full_like(largest, torch.inf),
        largest.clone(),
        *_affine_of_ends(*side.ends(largest), bits, symmetric),
    ]
    chunk = _chunk(rows, 10)
    for last in range(THRESHOLDS, 0, -chunk):
        shares = torch.arange(max(last - chunk, 0) + 1, last + 1, device=rows.device)
        candidates = (largest / THRESHOLDS) * shares[:, None]
        cut = (rows.abs() - reach * candidates[-1, :, None]).clamp_min_(0).pow_(SEARCH_NORM)
        cut = cut.mean(-1) if counts is None else cut.mul_(counts).sum(-1) / counts.sum(-1)
        if (cut > best[0]).all():
            break
        scales, points = _affine_of_ends(*side.ends(candidates), bits, symmetric)
        errors = _search_error(rows, counts, scales[..., None], points[..., None], grid)
        error, index = errors.min(0)
        better = error <= best[0]
        found = (error, *(each.gather(0, index[None])[0] for each in (candidates, scales, points)))
        for kept, new in zip(best, found, strict=True):
            kept[better] = new[better]
    return best[1], best[2], best[3]


class RangeObserver:
    """Range of a tensor over several batches: widest seen, or an exponential running average of batch extremes.

    ``momentum`` None keeps the widest range. Otherwise the first batch sets the ends and each later batch moves them,
    end <- momentum * end + (1 - momentum) * batch end (0.95 in Q-Diffusion and TFMQ-DM).
    One range a step when ``steps`` > 0, else a single one.
    """

    def __init__(self, momentum: float | None, steps: int = 0) -> None:
        self.momentum = momentum
        self.low = torch.full((max(steps, 1),), torch.nan, dtype=torch.float32)
        self.high = torch.full((max(steps, 1),), torch.nan, dtype=torch.float32)

    def update(self, x: Tensor, step: int = 0) -> None:
        """Take in one batch of finite values, all of one time step."""
        low, high = (end.detach().cpu() for end in extremes(x))
        if torch.isnan(self.low[step]):
            self.low[step], self.high[step] = low, high
        elif self.momentum is None:
            self.low[step] = torch.minimum(self.low[step], low)
            self.high[step] = torch.maximum(self.high[step], high)
        else:
            self.low[step] = self.momentum * self.low[step] + (1 - self.momentum) * low
            self.high[step] = self.momentum * self.high[step] + (1 - self.momentum) * high

    def affine(self, bits: int, symmetric: bool, positive: bool) -> tuple[Tensor, Tensor]:
        """Scale and zero point of shape (steps,), of the range extended to contain 0; ``positive`` starts it at 0."""
        low = torch.zeros_like(self.low) if positive else self.low.clamp_max(0)
        return affine_from_range(low, self.high.clamp_min(0), bits, symmetric)


class SearchObserver(RangeObserver):
    """The range that ``search`` finds for each batch, combined over batches as in ``RangeObserver``.

    Batches of more than 8,192 elements are searched by a histogram of as many bins (at 8 bits, 32 to a code where the
    range is widest), which counts every element and keeps the tails.
    """

    def __init__(self, bits: int, symmetric: bool, positive: bool, momentum: float | None, steps: int = 0) -> None:
        super().__init__(momentum, steps)
        self.bits, self.symmetric, self.positive = bits, symmetric, positive

    def update(self, x: Tensor, step: int = 0) -> None:
        """Take in one batch of finite values, all of one time step."""
        values, counts = _histogram(x)
        scale, zero_point = search(values, self.bits, self.symmetric, self.positive, counts)
        codes = (2 - 2**self.bits) / 2 if self.symmetric else -zero_point
        low = codes * scale
        high = -low if self.symmetric else low + (2**self.bits - 1) * scale
        super().update(torch.cat([low, high]), step)


class ThresholdObserver(RangeObserver):
    """PTQ4DM's activation range: the one that ``thresholds`` finds for each batch, combined as in ``RangeObserver``.

    The first batch is averaged with itself, which can change its last bit, and with it the zero point. The signs are
    those of the first batch of a step. Large batches are searched by a histogram as in ``SearchObserver``.
    ``symmetric`` is as in ``thresholds``.
    """

    def __init__(self, bits: int, momentum: float | None, steps: int = 0, symmetric: bool = False) -> None:
        super().__init__(momentum, steps)
        self.bits, self.symmetric = bits, symmetric
        self.sides: dict[int, Side] = {}

    def update(self, x: Tensor, step: int = 0) -> None:
        """Take in one batch of finite values, all of one time step."""
        side = self.sides.setdefault(step, Side.of(x))
        values, counts = _histogram(x)
        largest = x.detach().abs().max().float().reshape(1)
        threshold, _, _ = _best_threshold(values, counts, largest, self.bits, side, self.symmetric)
        ends = torch.cat(side.ends(threshold))
        for _ in range(1 + int(torch.isnan(self.low[step]))):
            super().update(ends, step)

    def affine(self, bits: int, symmetric: bool, positive: bool) -> tuple[Tensor, Tensor]:
        """Scale and zero point of shape (steps,), on the unsigned grid, or the signed one where ``symmetric``."""
        return _affine_of_ends(self.low, self.high, bits, symmetric)


def _histogram(x: Tensor) -> tuple[Tensor, Tensor]:
    """Values (1, n) that stand for the elements of ``x``, and how often each counts."""
    x = x.detach().reshape(-1).float()
    if len(x) <= HISTOGRAM_BINS:
        return x[None], torch.ones_like(x)[None]
    low, high = (end.item() for end in extremes(x))
    counts = torch.histc(x, HISTOGRAM_BINS, low, high)
    width = (high - low) / HISTOGRAM_BINS
    values = low + width * (torch.arange(HISTOGRAM_BINS, dtype=torch.float32, device=x.device) + 0.5)
    kept = counts > 0
    return values[kept][None], counts[kept][None]
