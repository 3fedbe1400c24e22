"""Activation quantisers written as integer kernels take them: dequantised values, or the codes themselves."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tfmq.modules.fake_quantize import FakeQuantize

BYTE = 8
SIGNED = (-128, 127)


class Position:
    """Which of the exported time steps is evaluated.

    Attributes:
        index: of the step, an int64 tensor (1,) that belongs to the traced graph.
        entries: of a network's tables over time steps, those of the exported steps; None for all.
    """

    index: Tensor

    def __init__(self, entries: Tensor | None = None) -> None:
        self.entries = entries

    def of(self, table: Tensor) -> Tensor:
        """The entries of a table (S,) at the exported time steps; one for all steps stays as it is."""
        return table.detach().clone() if len(table) == 1 or self.entries is None else table.detach()[self.entries]


class Range(nn.Module):
    """The quantiser of one activation tensor with one range for all time steps: quantised and dequantised values."""

    def __init__(self, quantizer: FakeQuantize) -> None:
        super().__init__()
        self.scale, self.zero_point = float(quantizer.scale), int(quantizer.zero_point)
        self.grid = SIGNED if quantizer.symmetric else (0, 255)
        ends = [(end - self.zero_point) * self.scale for end in quantizer.grid]
        # Kernels know grids of 256 codes: a narrower one is a part of that.
        self.ends = None if quantizer.bits == BYTE else ends

    def forward(self, x: Tensor) -> Tensor:
        if self.ends is not None:
            x = x.clamp(*self.ends)
        return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point, *self.grid)


class Codes(nn.Module):
    """The quantiser of one activation tensor as the codes themselves, for ranges that depend on the time step.

    Codes are the published ones minus ``offset``; a kernel's grid for them is ``grid``.

    Attributes:
        signed: moves unsigned codes to -128..127, as matrix products of two activations take them.

    Buffers:
        scale, zero_point, last: (S,) or (1,), with the last code of the grid.
    """

    scale: Tensor
    zero_point: Tensor
    last: Tensor

    def __init__(self, quantizer: FakeQuantize, position: Position, signed: bool = False) -> None:
        super().__init__()
        self.position, self.per_step = position, not is_constant(quantizer)
        self.grid = SIGNED if signed or quantizer.symmetric else (0, 255)
        self.offset = 128 if signed and not quantizer.symmetric else 0
        self.centred = quantizer.symmetric or (not self.offset and not bool(quantizer.zero_point.any()))
        mixed = quantizer.step_bits
        bits = torch.tensor([quantizer.bits]) if mixed is None else position.of(mixed)
        widths = bits.long() - int(quantizer.symmetric)
        self.first = quantizer.grid.qmin - self.offset
        self.narrow = bool((bits < BYTE).any())
        self.register_buffer("scale", position.of(quantizer.scale))
        self.register_buffer("zero_point", position.of(quantizer.zero_point) - self.offset)
        self.register_buffer("last", (2**widths - 1 - self.offset).to(torch.float32))

    def _now(self, table: Tensor) -> Tensor:
        return table[self.position.index] if self.per_step and len(table) > 1 else table

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes of ``x``, their scale (1,), and their zero point (1,) or None where it is 0."""
        scale, point = self._now(self.scale), None if self.centred else self._now(self.zero_point)
        codes = x / scale
        if point is not None:
            codes = codes + point
        if self.narrow:
            codes = torch.minimum(codes.clamp_min(self.first), self._now(self.last))
        return torch.fake_quantize_per_tensor_affine(codes, 1.0, 0, *self.grid), scale, point


def is_constant(quantizer: FakeQuantize) -> bool:
    """Whether a quantiser has one range for all time steps."""
    return not quantizer.per_step and quantizer.step_bits is None


def quantizer_twin(quantizer: FakeQuantize, position: Position) -> Range | Codes:
    """The executable quantiser of a layer's input. One whose zero point is no code of its grid gives codes, too."""
    grid = quantizer.grid
    plain = is_constant(quantizer) and grid.qmin <= float(quantizer.zero_point) <= grid.qmax
    return Range(quantizer) if plain else Codes(quantizer, position)
