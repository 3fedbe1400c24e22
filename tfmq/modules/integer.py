"""Quantised Conv2d and Linear that compute in integers: the executed twins of `tfmq.modules.layers`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tfmq.modules.channel_scales import DIVIDED, divides_channels
from tfmq.modules.fake_quantize import FakeQuantize, SplitFakeQuantize, StepTracker
from tfmq.modules.integer_products import (
    INT32,
    InputGrid,
    Packed,
    Window,
    exact_parts,
    input_grids,
    int_conv,
    int_mm,
    part_sizes,
)
from tfmq.modules.layers import QuantizedConv2d, QuantizedLayer
from tfmq.precision import FULL

CODE_BITS = 8
# Below so many codes plain sums cost less than a call of an 8-bit operator.
FEW = 2**18


class IntegerWeight(nn.Module):
    """The weight of consecutive input channels in signed 8-bit codes, and its products with codes of the input.

    A code is q - z where all of an output channel's q - z fit into 8 signed bits, and else q - 128: then 128 - z times
    the sum of the input under the window is left to add, q - z = code + offset.

    Buffers:
        codes: int8 (O, C, k, k) or (O, C).
        scale: (O,).
        offset: int32 (O,), or None where it is zero in all output channels.
        correction: offset scale, a row (1, O).
        bias: (O,), or None.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor | None
    correction: Tensor | None
    bias: Tensor | None

    def __init__(self, codes: Tensor, scale: Tensor, zero_point: Tensor, bias: object, window: Window | None) -> None:
        super().__init__()
        point = zero_point.to(torch.int32)
        centred = codes.to(torch.int32) - point.view(-1, *[1] * (codes.dim() - 1))
        fits = ((centred >= -128) & (centred <= 127)).flatten(1).all(1)
        shift = torch.where(fits, point, 128 if int(codes.max()) > 127 else 0)
        signed = codes.to(torch.int32) - shift.view(-1, *[1] * (codes.dim() - 1))
        self.window = window
        self.register_buffer("codes", signed.to(torch.int8).contiguous())
        self.register_buffer("scale", scale.detach().float().contiguous())
        offset = None if fits.all() else shift - point
        self.register_buffer("offset", offset)
        self.register_buffer("correction", None if offset is None else (offset * self.scale)[None])
        self.bias = nn.Parameter(bias.detach().float(), False) if isinstance(bias, Tensor) else None
        self.packed = Packed(self.codes, window)
        pools = window is not None and window.pools
        ones = torch.ones_like(self.codes[:1, :, 0, 0] if pools else self.codes[:1])
        self.ones = Packed(ones, None if pools else window)
        self.one = torch.ones(1)
        self._sizes: dict[int, list[int]] = {}  # of the parts that `in_floats` sums, by magnitude of the input

    def forward(self, codes: Tensor, grid: InputGrid) -> Tensor:
        """s_x s_w[c] sum (q_x - z_x) (q_w - z_w[c]) + b[c] for uint8 codes, (N, C, H, W) or (N, C)."""
        return self._on_cpu(codes, grid) if codes.device.type == "cpu" else self.elsewhere(codes, grid)

    def _on_cpu(self, codes: Tensor, grid: InputGrid) -> Tensor:
        if self.window is not None:
            codes = codes.contiguous(memory_format=torch.channels_last)
        y = self.packed.product(codes, grid, self.scale, self.bias)
        if self.correction is not None:
            # y += s_x sums correction, a product of a column and a row
            _rows(y).addmm_(self._sums(codes, grid.unscaled), self.correction, alpha=grid.scale)
        return y

    def _sums(self, codes: Tensor, grid: InputGrid) -> Tensor:
        """The sum of q_x - z_x under each position of the window, a column (N H W, 1)."""
        window = self.window
        if window is not None and not window.pools:
            return self.ones.product(codes, grid, self.one, None).reshape(-1, 1)
        rows = _rows(codes)
        if codes.numel() <= FEW:
            sums = (rows.sum(1, dtype=torch.int32) - grid.zero_point * rows.shape[1]).float()
        else:
            sums = self.ones.product(rows, grid, self.one, None)
        if window is not None and not window.is_point:
            by_image = sums.view(len(codes), 1, *codes.shape[2:])
            sums = F.avg_pool2d(by_image, window.size, window.stride, window.padding, divisor_override=1)
        return sums.view(-1, 1)

    def centred(self) -> Tensor:
        """q - z, int32 of the shape of the codes."""
        centred = self.codes.to(torch.int32)
        return centred if self.offset is None else centred.add_(self.offset.view(-1, *[1] * (centred.dim() - 1)))

    @cached_property
    def largest(self) -> int:
        """The largest |q - z|: read from the device once, as the others here are."""
        return int(self.centred().abs().max())

    @cached_property
    def magnitudes(self) -> Tensor:
        """What the |q - z| of a window add up to, int64 (O, C), on the CPU."""
        return self.centred().abs().unsqueeze(-1).flatten(2).sum(2).cpu()

    @cached_property
    def reach(self) -> int:
        """The largest sum of |q - z| of an output channel."""
        return int(self.magnitudes.sum(1).max())

    def elsewhere(self, codes: Tensor, grid: InputGrid) -> Tensor:
        """The same on any device."""
        pads = self.window is not None and any(self.window.padding)
        if self.reach * grid.largest >= INT32 or (pads and not 0 <= grid.zero_point <= 255):
            return self.in_floats(codes, grid)
        weight, outputs = self.codes, len(self.codes)
        if self.offset is not None:
            weight = torch.cat([weight, torch.ones_like(weight[:1])])  # one output channel more: the sum of the input
        product = int_mm if self.window is None else partial(int_conv, window=self.window)
        sums = product(codes, grid.zero_point, weight)
        shape = (-1, *[1] * (codes.dim() - 2))
        if self.offset is not None:
            sums = sums[:, :outputs] + sums[:, outputs:] * self.offset.view(shape)
        y = sums * (grid.scale * self.scale).view(shape)
        return y if self.bias is None else y.add_(self.bias.view(shape))

    def in_floats(self, codes: Tensor, grid: InputGrid) -> Tensor:
        """The same for any size and zero point: centred codes in floating point, whose sums are exact."""
        if grid.largest not in self._sizes:
            self._sizes[grid.largest] = part_sizes(self.magnitudes, grid.largest)
        sizes, largest = self._sizes[grid.largest], max(grid.largest, self.largest)
        sums = exact_parts(codes.float().sub_(grid.zero_point), self.centred().float(), self.window, sizes, largest)
        shape = (-1, *[1] * (self.codes.dim() - 2))
        y = sums * (grid.scale * self.scale).view(shape)
        return y if self.bias is None else y + self.bias.view(shape)


def _rows(y: Tensor) -> Tensor:
    """(N, C, H, W) in channels-last order, or (N, C), as a matrix (N H W, C) of the same memory."""
    return y.permute(0, 2, 3, 1).flatten(0, 2) if y.dim() == 4 else y


class IntegerLayer(nn.Module):
    """A Conv2d or Linear layer that computes in integers; made of a folded one by `integer_layer`.

    Attributes:
        sizes: of consecutive groups of input channels with grids of their own.
        grids: for each of these, its grid at each time step, or one for all.
        weights: IntegerWeight, one for each group.
        window: of a convolution.
        in_features: input channels, which the pipeline of Stable Diffusion XL asks its time embedding for.
    """

    def __init__(self, layer: QuantizedLayer, tracker: StepTracker) -> None:
        super().__init__()
        quantizer = layer.input_quantizer
        parts = [part for part in quantizer.modules() if isinstance(part, FakeQuantize)]
        self.tracker = tracker
        self.sizes = tuple(quantizer.sizes) if isinstance(quantizer, SplitFakeQuantize) else (layer.weight.shape[1],)
        self.grids = [input_grids(part) for part in parts]
        self.per_step = any(len(grids) > 1 for grids in self.grids)
        self.window = _window(layer) if isinstance(layer, QuantizedConv2d) else None
        self.in_features = layer.weight.shape[1]
        codes = layer.codes
        assert codes is not None
        self.weights = nn.ModuleList(
            IntegerWeight(
                piece,
                layer.weight_scale[:, index if layer.weight_scale.shape[1] > 1 else 0],
                layer.weight_zero_point[:, index if layer.weight_zero_point.shape[1] > 1 else 0],
                layer.bias if index == 0 else None,
                self.window,
            )
            for index, piece in enumerate(codes.split(self.sizes, 1))
        )

    @property
    def grid(self) -> InputGrid | None:
        """The only grid of the input at the current step, or None where there are several."""
        index = self.tracker.index
        if len(self.grids) > 1 or (isinstance(index, Tensor) and len(self.grids[0]) > 1):
            return None
        return _at(self.grids[0], index)

    @torch.no_grad()
    def forward(self, x: Tensor, silu: bool = False) -> Tensor:
        """(N, C, H, W) or (..., C), float32, as in simulation; with ``silu`` of SiLU of ``x``, which is overwritten."""
        return by_step(partial(self._at_step, silu=silu), self.tracker.index if self.per_step else 0, x)

    def _at_step(self, index: int, x: Tensor, silu: bool) -> Tensor:
        if len(self.grids) == 1:
            grid = _at(self.grids[0], index)
            return self.of_codes(grid.codes(x, silu), grid)
        if silu:
            x = F.silu(x, inplace=True)
        pieces = x.split(self.sizes, 1 if self.window is not None else -1)
        total: Tensor | None = None
        for piece, grids, weight in zip(pieces, self.grids, self.weights, strict=True):
            grid = _at(grids, index)
            part = self._product(grid.codes(piece), grid, weight)
            total = part if total is None else total.add_(part)
        assert total is not None
        return total

    def of_codes(self, codes: Tensor, grid: InputGrid) -> Tensor:
        """The output for codes of ``grid``, which is the layer's, that another layer may share."""
        return self._product(codes, grid, self.weights[0])

    def _product(self, codes: Tensor, grid: InputGrid, weight: nn.Module) -> Tensor:
        if self.window is not None:
            return weight(codes, grid)
        return weight(codes.reshape(-1, codes.shape[-1]), grid).view(*codes.shape[:-1], -1)


def _at(grids: tuple[InputGrid, ...], index: int | Tensor) -> InputGrid:
    return grids[0] if len(grids) == 1 else grids[int(index)]


def by_step(function: Callable[..., Tensor], index: int | Tensor, *tensors: Tensor) -> Tensor:
    """``function`` of a step's index and the tensors' rows of that step, for all steps of a batch."""
    if isinstance(index, int):
        return function(index, *tensors)
    output: Tensor | None = None
    for step in index.unique().tolist():
        rows = (index == step).nonzero().flatten().to(tensors[0].device)
        part = function(step, *(tensor[rows] for tensor in tensors))
        if output is None:
            output = part.new_empty(len(index), *part.shape[1:])
        output[rows] = part
    assert output is not None
    return output


def _window(layer: nn.Conv2d) -> Window:
    assert not isinstance(layer.padding, str)
    return Window(_pair(layer.kernel_size), _pair(layer.stride), _pair(layer.padding), _pair(layer.dilation))


def _pair(values: tuple[int, ...]) -> tuple[int, int]:
    return values[0], values[1]


def too_wide(quantizer: FakeQuantize) -> bool:
    """Whether the codes of an activation do not fit into a byte, at any time step."""
    widths = quantizer.step_bits
    return (quantizer.bits if widths is None else int(widths.max())) > CODE_BITS


def not_executable(layer: QuantizedLayer) -> str:
    """Why a layer cannot compute in integers, or an empty text."""
    if FULL in (layer.weight_bits, layer.activation_bits):
        return "its weight or its input is not quantised"
    if layer.rank:
        return "its low-rank branch computes in 16-bit floats"
    if layer.dynamic:
        return "the range of its input is dynamic"
    if divides_channels(layer):
        return DIVIDED
    if any(too_wide(part) for part in layer.input_quantizer.modules() if isinstance(part, FakeQuantize)):
        return f"its input has more than {CODE_BITS} bits"
    if len(layer.splits) > 1 and not isinstance(layer.input_quantizer, SplitFakeQuantize):
        return "groups of its input channels have weight ranges of their own"
    if isinstance(layer, nn.Conv2d) and (
        layer.groups > 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str)
    ):
        return "only one group of channels, padded with zeros by a number of pixels, is supported"
    return ""
