"""Layers and attention products written as integer kernels take them: codes in, integer weights, one factor behind.

With codes q and zero points z, a quantised layer is s_x s_w[c] sum (q_x - z_x)(q_w - z_w[c]) + b[c]. Here the weights'
part q_w - z_w[c] is an integer w of 8 bits plus, where it needs more, a whole number d[c] for each output channel:

    sum (q_x - z_x)(w + d[c]) = sum (q_x - z_x) w + d[c] sum (q_x - z_x),

so that what does not fit is d[c] times a sum over all input channels, the same for every output channel. Modules trace
into a graph in which quantisation is torch's own ``fake_quantize_per_tensor_affine`` and a weight is an 8-bit constant
times a scale: what OpenVINO's low-precision transformations and ONNX know.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tfmq.export.activations import Codes, Position, Range, quantizer_twin
from tfmq.modules.fake_quantize import FakeQuantize
from tfmq.modules.layers import QuantizedLayer

Pair = tuple[int, ...]


@dataclass(frozen=True)
class Geometry:
    """How an input meets a weight: in a convolution of some stride, padding and dilation, or a linear layer."""

    convolution: tuple[Pair, Pair, Pair] | None

    @classmethod
    def of(cls, layer: QuantizedLayer) -> Geometry:
        """That of a layer. Raises ValueError for padding that is no number of pixels."""
        if not isinstance(layer, nn.Conv2d):
            return cls(None)
        if isinstance(layer.padding, str):
            raise ValueError(f"padding is {layer.padding!r}: known are numbers of pixels")
        return cls((layer.stride, layer.padding, layer.dilation))

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Input (B, C, H, W) or (..., C) times weight, plus bias."""
        if self.convolution is None:
            return F.linear(x, weight, bias)
        stride, padding, dilation = self.convolution
        return F.conv2d(x, weight, bias, stride, padding, dilation)

    def by_channel(self, values: Tensor) -> Tensor:
        """Values (C,) in a shape that broadcasts against an output."""
        return values if self.convolution is None else values.view(1, -1, 1, 1)


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
    """Adds up a convolution's input over channels and kernel, (B, C, H, W) -> (B, 1, H', W'); a linear one's over C."""

    ones: Tensor

    def __init__(self, geometry: Geometry, kernel: Pair) -> None:
        super().__init__()
        self.geometry = geometry
        self.register_buffer("ones", torch.ones(1, 1, *kernel))

    def forward(self, x: Tensor) -> Tensor:
        if self.geometry.convolution is None:
            return x.sum(-1, keepdim=True)
        return self.geometry.product(x.sum(1, keepdim=True), self.ones)


class OfZeroPoint(nn.Module):
    """The product of a layer's weight with an input of ones: what each unit of an input's zero point adds.

    Where the kernel stands in the padding that is less than the sum of all weights.

    Buffers:
        sums: the weights' sums over input channels, (output channels, 1, *kernel), or (output channels,) if linear.
    """

    sums: Tensor

    def __init__(self, geometry: Geometry, sums: Tensor) -> None:
        super().__init__()
        self.geometry = geometry
        self.register_buffer("sums", sums[:, 0] if geometry.convolution is None else sums)

    def forward(self, x: Tensor) -> Tensor:
        if self.geometry.convolution is None:
            return self.sums
        return self.geometry.product(torch.ones_like(x[:1, :1]), self.sums)


class Product(nn.Module):
    """The product of an input, or of a part of its channels, with its part of a layer's weight."""

    bias: Tensor | None

    def __init__(
        self, layer: QuantizedLayer, codes: Tensor, part: int, quantizer: FakeQuantize, position: Position
    ) -> None:
        super().__init__()
        self.geometry = Geometry.of(layer)
        self.register_parameter("bias", _bias(layer) if part == 0 else None)
        self.quantizer = quantizer_twin(quantizer, position)
        scale, point = layer.weight_scale[:, part], layer.weight_zero_point[:, part]
        self.weight = Weight(codes, scale, point, layer.weight_bits)
        self.box = None if self.weight.rest is None else BoxSum(self.geometry, self.weight.kernel)
        self.of_zero_point = None
        if isinstance(self.quantizer, Codes) and not self.quantizer.centred:
            spread = self.weight.scale.shape
            sums = (codes.float() - point.view(spread)).sum(1, keepdim=True) * self.weight.scale
            self.of_zero_point = OfZeroPoint(self.geometry, sums)

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The product with the weight, and with what of it does not fit in 8 bits."""
        output, rest = self.geometry.product(x, self.weight(), bias), self.weight.rest
        if self.box is None or rest is None:
            return output
        return output + self.box(x) * self.geometry.by_channel(rest)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.quantizer, Range):
            return self._product(self.quantizer(x), self.bias)
        codes, scale, point = self.quantizer(x)
        output = self._product(codes, None)
        if point is not None and self.of_zero_point is not None:
            output = output - point * self.of_zero_point(x)
        output = output * scale
        return output if self.bias is None else output + self.geometry.by_channel(self.bias)


def _bias(layer: QuantizedLayer) -> nn.Parameter | None:
    bias = layer.bias
    return bias if isinstance(bias, nn.Parameter) else None


class ExecutableLayer(nn.Module):
    """Takes the place of a quantised Conv2d or Linear; split inputs are one product each, added up."""

    def __init__(self, layer: QuantizedLayer, position: Position) -> None:
        super().__init__()
        quantizers = [each for each in layer.input_quantizer.modules() if isinstance(each, FakeQuantize)]
        codes = layer.codes.split(layer.splits, 1) if layer.codes is not None else ()
        self.splits = layer.splits
        self.products = nn.ModuleList(
            Product(layer, own, part, quantizer, position)
            for part, (own, quantizer) in enumerate(zip(codes, quantizers, strict=True))
        )

    def forward(self, x: Tensor) -> Tensor:
        if len(self.products) == 1:
            return self.products[0](x)
        first, *others = (product(x) for product, x in zip(self.products, x.split(self.splits, 1), strict=True))
        return sum(others, first)


class WeightOnlyLayer(nn.Module):
    """Takes the place of a layer whose input is not quantised: codes and scales in the file, arithmetic in float."""

    bias: Tensor | None
    codes: Tensor
    zero_point: Tensor
    scale: Tensor

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__()
        self.geometry = Geometry.of(layer)
        self.register_parameter("bias", _bias(layer))
        self.register_buffer("codes", layer.codes)
        sizes = torch.tensor(layer.splits, device=layer.weight_scale.device)
        for name, table in (("zero_point", layer.weight_zero_point), ("scale", layer.weight_scale)):
            spread = table if len(layer.splits) == 1 else table.repeat_interleave(sizes, 1)
            self.register_buffer(name, spread.clone().view(*spread.shape, *[1] * (layer.weight.dim() - 2)))

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.codes.to(torch.float32) - self.zero_point) * self.scale
        return self.geometry.product(x, weight, self.bias)


class Table(nn.Module):
    """Takes the place of a time projection: its outputs (S, C) at every time step, looked up."""

    rows: Tensor

    def __init__(self, rows: Tensor, position: Position) -> None:
        super().__init__()
        self.position = position
        self.register_buffer("rows", rows.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.rows[self.position.index].expand(x.shape[0], -1)
