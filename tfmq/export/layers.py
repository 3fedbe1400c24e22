"""Layers and attention products written as integer kernels take them: codes in, integer weights, one factor behind.

With codes q and zero points z, a quantised layer is s_x s_w[c] sum (q_x - z_x)(q_w - z_w[c]) + b[c]. Here the weights'
part q_w - z_w[c] is an integer w of 8 bits plus, where it needs more, a whole number d[c] for each output channel:

    sum (q_x - z_x)(w + d[c]) = sum (q_x - z_x) w + d[c] sum (q_x - z_x),

so that what does not fit is d[c] times a sum over all input channels, the same for every output channel. Modules trace
into a graph in which quantisation is torch's own ``fake_quantize_per_tensor_affine`` and a weight is an 8-bit constant
times a scale: what OpenVINO's low-precision transformations and ONNX know.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tfmq.modules.fake_quantize import FakeQuantize, SplitFakeQuantize
from tfmq.modules.layers import QuantizedLayer

BYTE = 8
SIGNED = (-128, 127)


class Position:
    """Which of the time steps is evaluated: its index, an int64 tensor (1,) that belongs to the traced graph."""

    index: Tensor


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
        self.position = position
        self.grid = SIGNED if signed or quantizer.symmetric else (0, 255)
        self.offset = 128 if signed and not quantizer.symmetric else 0
        self.centred = quantizer.symmetric or (not self.offset and not bool(quantizer.zero_point.any()))
        bits = torch.full_like(quantizer.scale, quantizer.bits) if quantizer.step_bits is None else quantizer.step_bits
        widths = bits.long() - int(quantizer.symmetric)
        self.first = quantizer.grid.qmin - self.offset
        self.narrow = bool((bits < BYTE).any())
        self.register_buffer("scale", quantizer.scale.detach().clone())
        self.register_buffer("zero_point", quantizer.zero_point.detach() - self.offset)
        self.register_buffer("last", (2**widths - 1 - self.offset).to(torch.float32))

    def _now(self, table: Tensor) -> Tensor:
        return table if len(table) == 1 else table[self.position.index]

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


class Weight(nn.Module):
    """An integer weight of 8 bits with a scale for each output channel, and what does not fit in 8 bits.

    Attributes:
        bits: of the codes, 2 to 8.
        kernel: spatial size, empty where linear.

    Buffers:
        codes: int8, the published codes minus ``origin``.
        origin: uint8 (output channels,).
        scale: (output channels, 1, ...), to multiply the codes with.
        rest: (output channels,), scale times d[c], or None where all are 0.
    """

    codes: Tensor
    origin: Tensor
    scale: Tensor
    rest: Tensor | None

    def __init__(self, codes: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.kernel = tuple(codes.shape[2:])
        flat = codes.flatten(1).long()
        # Any origin between these two keeps all codes of the channel in -128..127; the zero point itself, if it can.
        lowest, highest = flat.amax(1) - 127, flat.amin(1) + 128
        origin = zero_point.long().clamp(min=lowest.clamp_min(0)).clamp(max=highest.clamp_max(2**bits - 1))
        rest = origin - zero_point.long()
        spread = (-1, *[1] * (codes.dim() - 1))
        self.register_buffer("codes", (codes.long() - origin.view(spread)).to(torch.int8))
        self.register_buffer("origin", origin.to(torch.uint8))
        self.register_buffer("scale", scale.detach().clone().view(spread))
        self.register_buffer("rest", scale * rest if bool(rest.any()) else None)

    def forward(self) -> Tensor:
        """The weight without what does not fit."""
        return self.codes.to(torch.float32) * self.scale


class BoxSum(nn.Module):
    """Adds up a conv layer's input over channels and kernel: (B, C, H, W) -> (B, 1, H', W'); a linear one's over C."""

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__()
        self.convolution = isinstance(layer, nn.Conv2d)
        if isinstance(layer, nn.Conv2d):
            self.stride, self.padding, self.dilation = layer.stride, layer.padding, layer.dilation
            self.register_buffer("ones", torch.ones(1, 1, *layer.kernel_size))

    def forward(self, x: Tensor) -> Tensor:
        if not self.convolution:
            return x.sum(-1, keepdim=True)
        return F.conv2d(x.sum(1, keepdim=True), self.ones, None, self.stride, self.padding, self.dilation)


class OfZeroPoint(nn.Module):
    """The product of a layer's weight with an input of ones: what each unit of an input's zero point adds.

    Where the kernel stands in the padding that is less than the sum of all weights.

    Buffers:
        sums: the weights' sums over input channels, (output channels, 1, *kernel), or (output channels,) if linear.
    """

    sums: Tensor

    def __init__(self, layer: QuantizedLayer, sums: Tensor) -> None:
        super().__init__()
        self.convolution = isinstance(layer, nn.Conv2d)
        if isinstance(layer, nn.Conv2d):
            self.stride, self.padding, self.dilation = layer.stride, layer.padding, layer.dilation
        self.register_buffer("sums", sums if self.convolution else sums[:, 0])

    def forward(self, x: Tensor) -> Tensor:
        if not self.convolution:
            return self.sums
        return F.conv2d(torch.ones_like(x[:1, :1]), self.sums, None, self.stride, self.padding, self.dilation)


class Product(nn.Module):
    """The product of an input, or of a part of its channels, with its part of a layer's weight."""

    def __init__(self, layer: QuantizedLayer, part: int, quantizer: FakeQuantize, position: Position) -> None:
        super().__init__()
        codes = layer.codes.split(layer.splits, 1)[part]
        self.bias = layer.bias if part == 0 else None
        self.convolution = isinstance(layer, nn.Conv2d)
        if isinstance(layer, nn.Conv2d):
            self.stride, self.padding, self.dilation = layer.stride, layer.padding, layer.dilation
        self.quantizer = quantizer_twin(quantizer, position)
        point = layer.weight_zero_point[:, part]
        self.weight = Weight(codes, layer.weight_scale[:, part], point, layer.weight_bits)
        self.box = None if self.weight.rest is None else BoxSum(layer)
        self.of_zero_point = None
        if isinstance(self.quantizer, Codes) and not self.quantizer.centred:
            spread = self.weight.scale.shape
            sums = (codes.float() - point.view(spread)).sum(1, keepdim=True) * self.weight.scale
            self.of_zero_point = OfZeroPoint(layer, sums)

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The product with the weight, and with what of it does not fit in 8 bits."""
        weight, rest = self.weight(), self.weight.rest
        if self.convolution:
            output = F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation)
        else:
            output = F.linear(x, weight, bias)
        if self.box is None or rest is None:
            return output
        return output + self.box(x) * (rest.view(1, -1, 1, 1) if self.convolution else rest)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.quantizer, Range):
            return self._product(self.quantizer(x), self.bias)
        codes, scale, point = self.quantizer(x)
        output = self._product(codes, None)
        if point is not None and self.of_zero_point is not None:
            output = output - point * self.of_zero_point(x)
        output = output * scale
        if self.bias is None:
            return output
        return output + (self.bias.view(1, -1, 1, 1) if self.convolution else self.bias)


class ExecutableLayer(nn.Module):
    """Takes the place of a quantised Conv2d or Linear; split inputs are one product each, added up."""

    def __init__(self, layer: QuantizedLayer, position: Position) -> None:
        super().__init__()
        quantizer = layer.input_quantizer
        parts = list(quantizer.parts) if isinstance(quantizer, SplitFakeQuantize) else [quantizer]
        self.splits = layer.splits
        self.products = nn.ModuleList(Product(layer, i, part, position) for i, part in enumerate(parts))

    def forward(self, x: Tensor) -> Tensor:
        if len(self.products) == 1:
            return self.products[0](x)
        first, *others = (product(x) for product, x in zip(self.products, x.split(self.splits, 1), strict=True))
        return sum(others, first)


class WeightOnlyLayer(nn.Module):
    """Takes the place of a layer whose input is not quantised: codes and scales in the file, arithmetic in float."""

    codes: Tensor
    zero_point: Tensor
    scale: Tensor

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__()
        self.bias = layer.bias
        self.convolution = isinstance(layer, nn.Conv2d)
        if isinstance(layer, nn.Conv2d):
            self.stride, self.padding, self.dilation = layer.stride, layer.padding, layer.dilation
        self.register_buffer("codes", layer.codes)
        for name, table in (("zero_point", layer.weight_zero_point), ("scale", layer.weight_scale)):
            sizes = torch.tensor(layer.splits, device=table.device)
            spread = table if table.shape[1] == 1 else table.repeat_interleave(sizes, 1)
            self.register_buffer(name, spread.detach().clone().view(*spread.shape, *[1] * (layer.codes.dim() - 2)))

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.codes.to(torch.float32) - self.zero_point) * self.scale
        if self.convolution:
            return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation)
        return F.linear(x, weight, self.bias)


class Table(nn.Module):
    """Takes the place of a time projection: its outputs (S, C) at every time step, looked up."""

    rows: Tensor

    def __init__(self, rows: Tensor, position: Position) -> None:
        super().__init__()
        self.position = position
        self.register_buffer("rows", rows.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.rows[self.position.index].expand(x.shape[0], -1)
