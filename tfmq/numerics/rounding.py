"""AdaRound: learning whether each weight rounds up or down (Nagel et al. 2020, arXiv 2004.10568).

w_hat = scale * (clamp(floor(w / scale) + h(alpha) + zero_point, qmin, qmax) - zero_point)
h(alpha) = clip(1.2 sigmoid(alpha) - 0.1, 0, 1)                                               (eq. 23)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from tfmq.numerics.affine import Grid

ZETA, GAMMA = 1.1, -0.1


def initial_alpha(weight: Tensor, scale: Tensor) -> Tensor:
    """The alpha at which h equals the fractional part of w / scale, so that soft rounding starts at the weight."""
    fraction = weight / scale
    fraction = fraction - fraction.floor()
    return -torch.log((ZETA - GAMMA) / (fraction - GAMMA) - 1)


def rectified_sigmoid(alpha: Tensor) -> Tensor:
    """h(alpha), between 0 (round down) and 1 (round up)."""
    return torch.clamp(torch.sigmoid(alpha) * (ZETA - GAMMA) + GAMMA, 0, 1)


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
        h: soft rounding of the latest forward pass.
        slope: d h / d alpha of the latest backward pass.
    """

    floor: Tensor
    scale: Tensor
    zero_point: Tensor
    free_scale: Tensor

    def __init__(self, weight: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.alpha = nn.Parameter(initial_alpha(weight, scale))
        self.register_buffer("floor", torch.floor(weight / scale) + zero_point, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("zero_point", zero_point, persistent=False)
        # A floor at or outside the grid's ends stays where it is, whatever h.
        free = (self.floor >= grid.qmin) & (self.floor < grid.qmax)
        self.register_buffer("free_scale", scale * free, persistent=False)
        self.h = rectified_sigmoid(self.alpha.detach())
        self.slope = torch.zeros_like(self.h)

    def forward(self) -> Tensor:
        """The weight with soft rounding."""
        return _SoftRounding.apply(self.alpha, self)

    @torch.no_grad()
    def add_penalty_gradient(self, weight: float, beta: float) -> None:
        """Add to ``alpha.grad`` that of weight * sum(1 - |2h - 1|^beta), after a backward pass.

        The regulariser (eq. 24) draws each h to 0 or 1; its value is not needed to learn. Raises ValueError where no
        backward pass has left a gradient.
        """
        if self.alpha.grad is None:
            raise ValueError("alpha has no gradient to add to: call backward first")
        centred = torch.rsub(self.h, 1, alpha=2)
        power = centred.abs().pow_(beta - 1).copysign_(centred)
        self.alpha.grad.addcmul_(power, self.slope, value=2 * weight * beta)

    @torch.no_grad()
    def codes(self) -> Tensor:
        """Integer codes after hard rounding: up where alpha >= 0."""
        return torch.clamp(self.floor + (self.alpha >= 0), *self.grid)


class _Context(FunctionCtx):
    rounding: AdaRound
    stretched: Tensor


class _SoftRounding(torch.autograd.Function):
    """The softly rounded weight, with its gradient in closed form: a third of the passes over memory of autograd's.

    d w_hat / d alpha = scale (1.1 - h) (h + 0.1) / 1.2, and 0 where h or the grid clips.
    """

    @staticmethod
    def forward(ctx: _Context, alpha: Tensor, rounding: AdaRound) -> Tensor:
        ctx.rounding = rounding
        ctx.stretched = torch.sigmoid(alpha).mul_(ZETA - GAMMA).add_(GAMMA)
        rounding.h = ctx.stretched.clamp(0, 1)
        codes = rounding.h + rounding.floor
        return codes.clamp_(*rounding.grid).sub_(rounding.zero_point).mul_(rounding.scale)

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, None]:
        rounding, stretched = ctx.rounding, ctx.stretched
        slope = (ZETA - stretched).mul_(stretched - GAMMA).mul_(1 / (ZETA - GAMMA))
        # In place, so that the comparison gives floats: several times faster than booleans.
        rounding.slope = slope.mul_(stretched.eq_(rounding.h))
        return (grad * rounding.free_scale).mul_(slope), None
