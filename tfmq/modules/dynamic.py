"""Dynamic activation quantisation: ranges are those of the input at hand, so nothing is calibrated."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tfmq.numerics.affine import Grid, affine_from_range, fake_quantize


class DynamicQuantize(nn.Module):
    """Quantise-dequantise each slice of a tensor in its own min-max range, extended to contain 0.

    Where a slice is one token of a matrix product, this is the per-token dynamic quantisation of the language-model and
    diffusion-transformer literature (ZeroQuant, arXiv 2206.01861, section 4.1). A slice with NaN comes out as NaN.
    Ranges are float32 at least: float16 and bfloat16 are quantised in float32, and come out in their own type.

    Args:
        bits: width of the codes.
        dim: the dimension that shares a range; None for all but the first.
        symmetric: signed grid with zero point 0 instead of an affine one.
        positive: for inputs in [0, inf): the range and the zero point start at 0 (softmax output).
    """

    active = True  # from the beginning

    def __init__(self, bits: int, dim: int | None = -1, symmetric: bool = False, positive: bool = False) -> None:
        super().__init__()
        self.bits = bits
        self.dim = dim
        self.symmetric = symmetric
        self.positive = positive
        self.grid = Grid.signed(bits) if symmetric else Grid.unsigned(bits)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype in (torch.float16, torch.bfloat16):
            return self.forward(x.float()).to(x.dtype)
        slices = x.flatten(1) if self.dim is None else x
        dim = 1 if self.dim is None else self.dim
        # torch.aminmax along a dimension takes ten times as long on a CPU.
        high = slices.amax(dim, keepdim=True).clamp_min(0)
        low = torch.zeros_like(high) if self.positive else slices.amin(dim, keepdim=True).clamp_max(0)
        scale, zero_point = affine_from_range(low, high, self.bits, self.symmetric)
        return fake_quantize(slices, scale, zero_point, self.grid).view(x.shape)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, dim={self.dim}, symmetric={self.symmetric}"
