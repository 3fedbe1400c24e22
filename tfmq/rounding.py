"""AdaRound: learning whether each weight rounds up or down (Nagel et al. 2020, arXiv 2004.10568).

w_hat = scale * (clamp(floor(w / scale) + h(alpha) + zero_point, qmin, qmax) - zero_point)
h(alpha) = clip(1.2 sigmoid(alpha) - 0.1, 0, 1)                                               (eq. 23)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tfmq.affine import Grid, dequantize

ZETA, GAMMA = 1.1, -0.1


def initial_alpha(weight: Tensor, scale: Tensor) -> Tensor:
    """The alpha at which h equals the fractional part of w / scale, so that soft rounding starts at the weight."""
    fraction = weight / scale
    fraction = fraction - fraction.floor()
    return -torch.log((ZETA - GAMMA) / (fraction - GAMMA) - 1)


def rectified_sigmoid(alpha: Tensor) -> Tensor:
    """h(alpha), between 0 (round down) and 1 (round up)."""
    return torch.clamp(torch.sigmoid(alpha) * (ZETA - GAMMA) + GAMMA, 0, 1)


def regularizer(h: Tensor, beta: float) -> Tensor:
    """Sum over weights of 1 - |2h - 1|^beta, which draws each h to 0 or 1 (eq. 24)."""
    return (1 - (2 * h - 1).abs().pow(beta)).sum()


def annealed_beta(
    iteration: int, iterations: int, warmup: float = 0.2, start: float = 20, end: float = 2
) -> float | None:
    """Beta at ``iteration`` (counted from 1): None while the regulariser is off, then linear from start to end."""
    first = warmup * iterations
    if iteration < first:
        return None
    done = (iteration - first) / (iterations - first) if iterations > first else 1.0
    return end + (start - end) * max(0.0, 1 - done)


class AdaRound(nn.Module):
    """Learned rounding of one weight; ``scale`` and ``zero_point`` broadcast against it and stay fixed.

    Attributes:
        alpha: what is learned, shape of the weight.
        h: soft rounding of the latest forward pass, for the regulariser.
    """

    def __init__(self, weight: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.alpha = nn.Parameter(initial_alpha(weight, scale))
        self.register_buffer("floor", torch.floor(weight / scale) + zero_point, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("zero_point", zero_point, persistent=False)
        self.h = rectified_sigmoid(self.alpha)

    def forward(self) -> Tensor:
        """The weight with soft rounding."""
        self.h = rectified_sigmoid(self.alpha)
        return dequantize(torch.clamp(self.floor + self.h, *self.grid), self.scale, self.zero_point)

    @torch.no_grad()
    def codes(self) -> Tensor:
        """Integer codes after hard rounding: up where alpha >= 0."""
        return torch.clamp(self.floor + (self.alpha >= 0), *self.grid)
