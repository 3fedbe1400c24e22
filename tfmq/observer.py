"""Choosing the range [low, high] that a grid spans: min-max, mean-squared-error search, running average.

"Rows" are the slices that share a scale: one row for a per-tensor scale, one an output channel for weights.
All functions take a matrix of shape (rows, elements) and return tensors of shape (rows,).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tfmq.affine import Grid, affine_from_range, dequantize, quantize

SEARCH_CANDIDATES = 80
SEARCH_NORM = 2.4
_SEARCH_BYTES = 2**26


def minmax(rows: Tensor, bits: int, symmetric: bool = False) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each row's range, extended to contain 0."""
    low = rows.amin(1).clamp_max(0)
    high = rows.amax(1).clamp_min(0)
    return affine_from_range(low, high, bits, symmetric)


def search(rows: Tensor, bits: int, symmetric: bool = False, positive: bool = False) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each row with the smallest mean |x - x_hat|^2.4 among 80 shrunken ranges.

    Candidate i spans both ends of [min, max] times (1 - 0.01 i), i = 0..79, as in BRECQ, Q-Diffusion and TFMQ-DM. The
    ends are not extended to contain 0. ``positive`` fixes the lower end and the zero point at 0 (softmax output).
    Vectorised over rows and candidates; candidates are taken in chunks so that a chunk stays near 64 MiB. An all-zero
    row keeps the smallest scale. Ties keep the widest range.
    """
    low = torch.zeros_like(rows[:, 0]) if positive else rows.amin(1)
    high = rows.amax(1)
    shrink = 1 - 0.01 * torch.arange(SEARCH_CANDIDATES, dtype=torch.float64, device=rows.device)
    lows = (shrink[:, None] * low.double()).to(rows.dtype)
    highs = (shrink[:, None] * high.double()).to(rows.dtype)
    scales, zero_points = affine_from_range(lows, highs, bits, symmetric)
    grid = Grid.signed(bits) if symmetric else Grid.unsigned(bits)
    chunk = max(1, _SEARCH_BYTES // (rows.numel() * rows.element_size()))
    errors = torch.cat(
        [
            _search_error(rows, scales[i : i + chunk, :, None], zero_points[i : i + chunk, :, None], grid)
            for i in range(0, SEARCH_CANDIDATES, chunk)
        ]
    )
    best = errors.argmin(0, keepdim=True)
    return scales.gather(0, best)[0], zero_points.gather(0, best)[0]


def _search_error(rows: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    error = dequantize(quantize(rows, scale, zero_point, grid), scale, zero_point).sub_(rows).abs_()
    return error.pow_(SEARCH_NORM).mean(-1)


class RangeObserver:
    """Range of a tensor over several batches: widest seen, or an exponential running average of batch extremes.

    ``momentum`` None keeps the widest range. Otherwise the first batch sets the ends and each later batch moves them,
    end <- momentum * end + (1 - momentum) * batch end (0.95 in Q-Diffusion and TFMQ-DM).
    One range a step when ``steps`` > 0, else a single one.
    """

    def __init__(self, momentum: float | None, steps: int = 0) -> None:
        self.momentum = momentum
        self.low = torch.full((max(steps, 1),), torch.nan)
        self.high = torch.full((max(steps, 1),), torch.nan)

    def update(self, x: Tensor, step: int = 0) -> None:
        """Take in one batch of finite values, all of one time step."""
        low, high = (end.detach().cpu() for end in torch.aminmax(x))
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
