"""Logarithmic quantisation to base 2 as pure functions.

q = clamp(round(-log2(x / scale)), 0, 2^b - 1),   x_hat = scale 2^-q

for x from 0 to ``scale``: the largest value is exact, and each code further down halves the value. Small values keep
their relative precision, where a uniform grid rounds them to 0; the relative error of large ones stays as it is,
however many bits there are. What is 0 takes the last code.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


def log2_codes(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Integer codes of ``x``, as floats; ``scale`` broadcasts against it. NaN stays NaN."""
    return torch.div(x, scale).log2_().neg_().round_().clamp_(0, 2**bits - 1)


def log2_fake_quantize(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Quantise and dequantise; differentiable in ``x`` and ``scale`` by the straight-through rule.

    An ``x`` of a smaller type than ``scale``, such as float16, is quantised in that of ``scale`` and comes out in its
    own.
    """
    wider = torch.promote_types(x.dtype, scale.dtype)
    if wider != x.dtype:
        return log2_fake_quantize(x.to(wider), scale, bits).to(x.dtype)
    if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad):
        return _Log2FakeQuantize.apply(x, scale, bits)
    return torch.exp2(-log2_codes(x, scale, bits)).mul_(scale)


class _Context(FunctionCtx):
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]


class _Log2FakeQuantize(torch.autograd.Function):
    """Gradients as of uniform grids in LSQ (arXiv 1902.08153, eq. 3-5), with 2^-q in the place of the integer code:

    d x_hat / d x = 1 inside the grid, else 0;  d x_hat / d scale = 2^-q - x / scale inside, 2^-q outside.
    """

    @staticmethod
    def forward(ctx: _Context, x: Tensor, scale: Tensor, bits: int) -> Tensor:
        ratio = x / scale
        rounded = -ratio.log2().round()
        codes = rounded.clamp(0, 2**bits - 1)
        powers = torch.exp2(-codes)
        ctx.save_for_backward(ratio, scale, powers, codes == rounded)
        return powers * scale

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        ratio, scale, powers, inside = ctx.saved_tensors
        passed = grad * inside
        grad_scale = (grad * powers - passed * ratio).sum_to_size(scale.shape) if ctx.needs_input_grad[1] else None
        return (passed if ctx.needs_input_grad[0] else None), grad_scale, None
