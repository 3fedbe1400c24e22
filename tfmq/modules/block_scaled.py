"""Layers in block formats: consecutive channels of weight and input share a scale of 8 bits.

`tfmq.numerics.block_scales` has the formats. Blocks lie along the dimension that a product sums over: input channels,
at one kernel position of a weight and at one pixel or token of an input. So every partial sum of a block is one of
integers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tfmq.modules.dynamic import DynamicQuantize
from tfmq.modules.fake_quantize import StepTracker
from tfmq.modules.layers import QuantizedConv2d, QuantizedLayer, QuantizedLinear
from tfmq.numerics.affine import Grid, fake_quantize
from tfmq.numerics.block_scales import (
    BLOCK_SCALES,
    ScaleFormat,
    block_grid,
    coarse_scale,
    e4m3_codes,
    e4m3_scales,
    e8m0_codes,
    e8m0_scales,
    in_blocks,
    out_of_blocks,
)
from tfmq.precision import FULL


class BlockQuantize(DynamicQuantize):
    """Quantise-dequantise blocks of an input, each with the scale of its own largest value, at run time.

    Nothing is calibrated. Where scales are ``e4m3``, their coarse scale is that of each image. Gradients pass straight
    through inside the grid; scales have none.

    Args:
        bits: width of the codes.
        dim: the dimension that is cut into blocks.
        block: values in one.
        scales: ``e8m0`` or ``e4m3``.
        unsigned: for inputs that are not negative, such as outputs of ReLU: codes begin at 0.
    """

    def __init__(self, bits: int, dim: int, block: int, scales: ScaleFormat, unsigned: bool = False) -> None:
        super().__init__(bits, dim, symmetric=True, positive=unsigned)
        self.grid = block_grid(bits, unsigned)
        self.block = block
        self.scales = scales

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype in (torch.float16, torch.bfloat16):
            return self.forward(x.float()).to(x.dtype)
        assert self.dim is not None
        dim = self.dim % x.dim()
        blocks = in_blocks(x, dim, self.block)
        with torch.no_grad():
            largest = blocks.abs().amax(dim + 1, keepdim=True).float()
            scale = self._scale(largest)
        zero = torch.zeros((), device=x.device)
        return out_of_blocks(fake_quantize(blocks, scale, zero, self.grid), dim, x.shape[dim])

    def _scale(self, largest: Tensor) -> Tensor:
        """The scales of blocks with these largest magnitudes, of the same shape."""
        if self.scales == "e8m0":
            return e8m0_scales(e8m0_codes(largest), self.bits)
        coarse = coarse_scale(largest.amax(tuple(range(1, largest.dim())), keepdim=True), self.grid.qmax)
        return e4m3_scales(e4m3_codes(largest, self.grid.qmax, coarse), coarse)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, block={self.block}, scales={self.scales}, unsigned={self.positive}"


class BlockScaledLayer(QuantizedLayer):
    """What Conv2d and Linear in block formats share.

    The weight's scales follow from ``scale_codes`` and ``coarse``; they are those of its largest values, and no pass
    can set others. Codes of weights are stored with the middle of the grid added, as those of all layers are.

    Buffers:
        scale_codes: uint8 (output channels, blocks, *kernel), exponents or the bits of E4M3.
        coarse: float32 (output channels,), with ``e4m3`` only.
    """

    scale_codes: Tensor
    coarse: Tensor

    @property
    def grid(self) -> Grid:
        low, high = block_grid(self.weight_bits, unsigned=False)
        return Grid(low + self._middle, high + self._middle)

    @property
    def _middle(self) -> int:
        return 2 ** (self.weight_bits - 1)

    @property
    def weight_scale(self) -> Tensor:
        """Of each block: (output channels, blocks, *kernel)."""
        if self.scales == "e8m0":
            return e8m0_scales(self.scale_codes, self.weight_bits)
        return e4m3_scales(self.scale_codes, _per_channel(self.coarse, self.scale_codes))

    @weight_scale.setter
    def weight_scale(self, scale: Tensor) -> None:
        raise ValueError(
            f"the scales of a weight in blocks are those of the format {self.scales}, and cannot be set: take a recipe "
            "whose passes only round such weights"
        )

    @property
    def weight_zero_point(self) -> Tensor:
        """The middle of the grid, for all blocks."""
        return torch.full_like(self.scale_codes, self._middle, dtype=torch.float32)

    @weight_zero_point.setter
    def weight_zero_point(self, zero_point: Tensor) -> None:
        raise ValueError("the codes of a weight in blocks are symmetric, and no other zero point can be set")

    def register_scales(self) -> None:
        outputs, inputs, *kernel = self.weight.shape
        codes = torch.full((outputs, -(-inputs // self.block), *kernel), 127, dtype=torch.uint8)
        self.register_buffer("scale_codes", codes)
        if self.scales == "e4m3":
            self.register_buffer("coarse", torch.ones(outputs, dtype=torch.float32))

    @torch.no_grad()
    def find_weight_range(self, method: str) -> None:
        """Set the scales by the largest value of each block. Raises ValueError for another method than ``minmax``."""
        if method != "minmax":
            raise ValueError(f"a weight in blocks has the scales of its largest values: take minmax, not {method}")
        self.ranged = True
        largest = in_blocks(self.weight, 1, self.block).abs().amax(2).float()
        if self.scales == "e8m0":
            self.scale_codes = e8m0_codes(largest)
            return
        levels = block_grid(self.weight_bits, unsigned=False).qmax
        self.coarse = coarse_scale(largest.flatten(1).amax(1), levels)
        self.scale_codes = e4m3_codes(largest, levels, _per_channel(self.coarse, largest))

    def spread(self, per_group: Tensor) -> Tensor:
        """What there is of each block, in the shape of the weight."""
        return per_group.repeat_interleave(self.block, 1)[:, : self.weight.shape[1]]


class BlockConv2d(BlockScaledLayer, QuantizedConv2d):
    """Conv2d in a block format."""


class BlockLinear(BlockScaledLayer, QuantizedLinear):
    """Linear layer in a block format."""


def block_layer(
    layer: nn.Conv2d | nn.Linear,
    weight_bits: int,
    activation_bits: int,
    tracker: StepTracker,
    block: int,
    scales: ScaleFormat,
    unsigned: bool,
) -> BlockConv2d | BlockLinear:
    """The twin of ``layer`` in a block format, sharing its parameters (the weight is not quantised yet)."""
    if scales not in BLOCK_SCALES:
        raise ValueError(f"blocks have scales {scales!r}: choose {' or '.join(BLOCK_SCALES)}")
    if isinstance(layer, nn.Conv2d):
        same = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
        options = {name: getattr(layer, name) for name in same}
        twin: BlockConv2d | BlockLinear = BlockConv2d(**options, bias=layer.bias is not None, device="meta")
        dim = 1
    else:
        twin = BlockLinear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        dim = -1
    twin.weight, twin.bias = layer.weight, layer.bias
    twin.block, twin.scales, twin.unsigned = block, scales, unsigned
    twin.set_up(weight_bits, FULL, (layer.weight.shape[1],), True, True, 0, tracker)
    twin.activation_bits = activation_bits
    if activation_bits != FULL:
        twin.input_quantizer = BlockQuantize(activation_bits, dim, block, scales, unsigned)
    return twin


def _per_channel(coarse: Tensor, like: Tensor) -> Tensor:
    """(output channels,) in a shape that broadcasts against ``like``."""
    return coarse.view(-1, *[1] * (like.dim() - 1))
