"""AutoRound: learning an offset of each weight and the ends of its ranges (Cheng et al. 2023, arXiv 2309.05516).

    w_hat = scale * (clamp(round(w / scale + V) + zero_point, qmin, qmax) - zero_point)
    scale = (alpha max(w) - beta min(w)) / (2^b - 1),  zero_point = round(-beta min(w) / scale)

V in [-0.5, 0.5], alpha and beta in [0, 1], all learned by the signs of their gradients; rounding is passed straight
through.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from tfmq.numerics.affine import Grid, affine_from_range

FARTHEST = 0.5


class AutoRound(nn.Module):
    """Learned rounding of one weight in learned ranges, which start at round-to-nearest in the ranges given.

    Args:
        weight: what is rounded.
        low, high: ends of its ranges, of the shape that ``spread`` makes broadcast against the weight.
        bits, symmetric: of the grid, whose codes are unsigned: those of a symmetric one begin half-way.
        spread: as `tfmq.modules.layers.QuantizedLayer.spread`.

    Attributes:
        offset: V, shape of the weight.
        low_share, high_share: beta and alpha.
    """

    weight: Tensor
    low: Tensor
    high: Tensor

    def __init__(
        self,
        weight: Tensor,
        low: Tensor,
        high: Tensor,
        bits: int,
        symmetric: bool,
        spread: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.bits, self.symmetric, self.spread = bits, symmetric, spread
        self.grid = Grid.unsigned(bits)
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("low", low, persistent=False)
        self.register_buffer("high", high, persistent=False)
        self.offset = nn.Parameter(torch.zeros_like(weight))
        self.low_share = nn.Parameter(torch.ones_like(low))
        self.high_share = nn.Parameter(torch.ones_like(high))

    @property
    def learned(self) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
        """What is learned."""
        return self.offset, self.low_share, self.high_share

    def ranges(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of each range; differentiable in the shares of its ends."""
        low, high = self.low_share * self.low, self.high_share * self.high
        scale, zero_point = affine_from_range(low, high, self.bits, self.symmetric)
        if self.symmetric:
            return scale, torch.full_like(zero_point, 2 ** (self.bits - 1))
        exact = -low / scale
        return scale, zero_point.detach() + (exact - exact.detach())

    def forward(self) -> Tensor:
        """The rounded weight."""
        scale, zero_point = (self.spread(each) for each in self.ranges())
        return _OffsetRounding.apply(self.weight, self.offset, scale, zero_point, self.grid)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Move all that is learned by ``rate`` against the sign of its gradient, and back into its bounds."""
        for part, least, most in zip(self.learned, (-FARTHEST, 0, 0), (FARTHEST, 1, 1), strict=True):
            if part.grad is not None:
                part.sub_(part.grad.sign_(), alpha=rate).clamp_(least, most)

    @torch.no_grad()
    def codes(self) -> Tensor:
        """Integer codes."""
        scale, zero_point = (self.spread(each) for each in self.ranges())
        return (self.weight / scale).add_(self.offset).round_().add_(zero_point).clamp_(*self.grid)


class _Context(FunctionCtx):
    saved_tensors: tuple[Tensor, ...]


class _OffsetRounding(torch.autograd.Function):
    """The rounded weight, with rounding passed straight through, and clipping at both grid ends ("closed").

    Inside the grid d w_hat / d V = scale, d w_hat / d scale = (q - z) - w / scale and d w_hat / d z = 0; where the grid
    clips they are 0, q - z and -scale.
    """

    @staticmethod
    def forward(ctx: _Context, weight: Tensor, offset: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
        exact = weight / scale
        rounded = (exact + offset).round_().add_(zero_point)
        centred = rounded.clamp(*grid)
        # In place, so that the comparison gives floats, which are several times faster to multiply by than booleans.
        inside = rounded.eq_(centred)
        centred.sub_(zero_point)
        ctx.save_for_backward(scale, exact, centred, inside)
        return centred * scale

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[None, Tensor, Tensor, Tensor, None]:
        scale, exact, centred, inside = ctx.saved_tensors
        passed = grad * inside
        of_scale = (grad * centred).addcmul_(passed, exact, value=-1).sum_to_size(scale.shape)
        of_zero_point = (passed - grad).sum_to_size(scale.shape) * scale
        return None, passed * scale, of_scale, of_zero_point, None
