"""Quantised Conv2d and Linear: drop-in modules for a network of diffusers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tfmq.modules.dynamic import DynamicQuantize
from tfmq.modules.fake_quantize import FakeQuantize, SplitFakeQuantize, StepTracker
from tfmq.modules.number_types import KeepsTypes
from tfmq.numerics.affine import Grid, dequantize, quantize
from tfmq.numerics.block_scales import ScaleFormat
from tfmq.numerics.observer import minmax, search, thresholds
from tfmq.numerics.rounding import AdaRound
from tfmq.precision import FULL

RANGES = {"minmax": minmax, "search": search, "thresholds": thresholds}


class QuantizedLayer(KeepsTypes):
    """What the quantised Conv2d and Linear share. Weights are affine per output channel, the bias stays as it is.

    ``weight`` holds the full-precision weight until ``fold`` replaces it by its dequantised codes; from then on the
    forward pass costs no weight quantisation.

    With a low-rank branch (SVDQuant) the input is divided by ``smoothing`` first, ``weight`` is what the
    branch leaves of the smoothed weight, and the branch takes the smoothed input unquantised.

    Casting to another type casts weight and bias. A folded weight is then made of its codes anew, so that casting there
    and back loses nothing; all buffers keep their types.

    Attributes:
        weight_bits, activation_bits: 32 where not quantised.
        splits: sizes of consecutive groups of input channels that have ranges of their own; one entry where unsplit.
        symmetric_weight: whether the weight's range is symmetric around 0, its zero point the middle of the grid.
        ranged: whether the weight has a range to be rounded in.
        rounding: what gives the weight while its rounding is learned.
        codes: uint8, shape of the weight, once folded.
        weight_scale, weight_zero_point: (output channels, groups).
        input_quantizer: FakeQuantize, SplitFakeQuantize, DynamicQuantize or Identity; or ChannelScales around it.
        symmetric, dynamic: of the input's quantiser.
        rank: of the branch, 0 for none.
        block, scales, unsigned: as in ``LayerPlan``; set in `tfmq.modules.block_scaled`.
        smoothing: (input channels,), with a branch only.
        down, up: float16, (rank, input channels, *kernel) and (output channels, rank, 1, 1) or without the ones where
            linear, with a branch only; computed in the input's type.
    """

    weight_bits: int
    activation_bits: int
    splits: tuple[int, ...]
    symmetric: bool
    dynamic: bool
    rank: int
    block: int = 0
    scales: ScaleFormat = "float32"
    unsigned: bool = False
    symmetric_weight: bool
    ranged: bool
    rounding: nn.Module | None
    input_quantizer: nn.Module
    weight: Tensor  # a parameter; declared as in torch's own layers
    codes: Tensor | None
    weight_scale: Tensor
    weight_zero_point: Tensor
    smoothing: Tensor
    down: Tensor
    up: Tensor

    def set_up(
        self,
        weight_bits: int,
        activation_bits: int,
        splits: tuple[int, ...],
        symmetric: bool,
        dynamic: bool,
        rank: int,
        tracker: StepTracker,
    ) -> None:
        self.weight_bits = weight_bits
        self.activation_bits = activation_bits
        self.splits = splits
        self.symmetric = symmetric
        self.dynamic = dynamic
        self.rank = rank
        self.symmetric_weight = False
        self.ranged = False
        self.rounding = None
        self.register_buffer("codes", None)
        self.register_scales()
        if rank:
            outputs, inputs, *kernel = self.weight.shape
            self.register_buffer("smoothing", torch.ones(inputs, dtype=torch.float32))
            self.register_buffer("down", torch.zeros(rank, inputs, *kernel, dtype=torch.float16))
            self.register_buffer("up", torch.zeros(outputs, rank, *[1] * len(kernel), dtype=torch.float16))
        if activation_bits == FULL:
            self.input_quantizer = nn.Identity()
            return
        if dynamic:
            self.input_quantizer = DynamicQuantize(activation_bits, self.dynamic_dim, symmetric)
            return
        parts = [FakeQuantize(activation_bits, tracker, symmetric) for _ in splits]
        self.input_quantizer = SplitFakeQuantize(splits, parts) if len(parts) > 1 else parts[0]

    def register_scales(self) -> None:
        """Make the buffers that the weight's scales are kept in."""
        scales = (self.weight.shape[0], len(self.splits))
        self.register_buffer("weight_scale", torch.ones(scales, dtype=torch.float32))
        self.register_buffer("weight_zero_point", torch.zeros(scales, dtype=torch.float32))

    @property
    def grid(self) -> Grid:
        return Grid.unsigned(self.weight_bits)

    @property
    def dynamic_dim(self) -> int | None:
        """The dimension of the input that shares a dynamic range; None for all of an image."""
        raise NotImplementedError

    @torch.no_grad()
    def find_weight_range(self, method: str) -> None:
        """Set the weight's scales by one of ``RANGES``."""
        self.ranged = True
        bits, symmetric = self.weight_bits, self.symmetric_weight
        groups = [RANGES[method](group.flatten(1), bits, symmetric) for group in self.weight.split(self.splits, 1)]
        self.weight_scale = torch.stack([scale for scale, _ in groups], 1)
        # Codes are unsigned: those of a signed grid begin half-way.
        points = [torch.full_like(point, 2 ** (bits - 1)) if symmetric else point for _, point in groups]
        self.weight_zero_point = torch.stack(points, 1)

    def spread(self, per_group: Tensor) -> Tensor:
        """What there is of each output channel and group, in a shape that broadcasts against the weight."""
        if len(self.splits) > 1:
            per_group = per_group.repeat_interleave(
                torch.tensor(self.splits, device=per_group.device), 1, output_size=sum(self.splits)
            )
        return per_group.view(*per_group.shape, *[1] * (self.weight.dim() - 2))

    def learn_rounding(self) -> AdaRound:
        """Start AdaRound from the present ranges; ``effective_weight`` uses it until ``fold``."""
        self.check_ranged()
        scale, zero_point = self.spread(self.weight_scale), self.spread(self.weight_zero_point)
        rounding = self.rounding = AdaRound(self.weight.detach(), scale, zero_point, self.grid)
        return rounding

    @torch.no_grad()
    def fold(self) -> None:
        """Round for good (learned rounding if any, else to nearest) and replace the weight by its dequantised codes.

        Raises ValueError for a weight that has no range.
        """
        self.check_ranged()
        scale, zero_point = self.spread(self.weight_scale), self.spread(self.weight_zero_point)
        if isinstance(self.rounding, AdaRound):
            codes, self.rounding = self.rounding.codes(), None
        else:
            codes = quantize(self.weight, scale, zero_point, self.grid)
        self.load_codes(codes.to(torch.uint8))

    def check_ranged(self) -> None:
        """Raise ValueError for a weight whose range was not found since it was put in place."""
        if not self.ranged:
            raise ValueError("a weight has no range to be rounded in: let WeightRanges come before it is rounded")

    @property
    def consistent(self) -> bool:
        """Whether the weight is that of the codes, in the weight's type."""
        if self.codes is None:
            return False
        return torch.equal(self._dequantized(self.codes).to(self.weight.dtype), self.weight)

    def _dequantized(self, codes: Tensor) -> Tensor:
        return dequantize(codes, self.spread(self.weight_scale), self.spread(self.weight_zero_point))

    @torch.no_grad()
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        weight = self.weight.data
        super()._apply(fn, recurse)
        if self.weight.dtype != weight.dtype and self.codes is not None and not self.weight.is_meta:
            values = self._dequantized(self.codes)
            # A weight that something else has changed is cast as it is: the codes do not have it.
            if torch.equal(values.to(weight), weight):
                self.weight.copy_(values)
        return self

    @torch.no_grad()
    def load_codes(self, codes: Tensor) -> None:
        """Take integer codes (uint8, shape of the weight) with the present scales as the weight."""
        self.codes = codes
        self.weight = nn.Parameter(self._dequantized(codes).to(self.weight.dtype), requires_grad=False)

    def effective_weight(self) -> Tensor:
        return self.weight if self.rounding is None else self.rounding()


class QuantizedConv2d(QuantizedLayer, nn.Conv2d):
    """Conv2d whose weight and input are quantised.

    As a LoRA makes layers of the class that it is attached to, one that was not set up is a plain Conv2d.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: torch.device | str | None = None,
    ) -> None:
        nn.Conv2d.__init__(
            self, in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device
        )
        self.rank, self.rounding, self.weight_bits, self.activation_bits = 0, None, FULL, FULL
        self.register_buffer("codes", None)
        self.input_quantizer = nn.Identity()

    @property
    def dynamic_dim(self) -> int | None:
        # A kernel of one pixel is a matrix product per pixel; larger ones mix pixels in one sum.
        return 1 if self.kernel_size == (1, 1) else None

    def forward(self, x: Tensor) -> Tensor:
        if not self.rank:
            return self._conv_forward(self.input_quantizer(x), self.effective_weight(), self.bias)
        x = (x / self.smoothing.view(-1, 1, 1)).to(x.dtype)
        branch = F.conv2d(self._conv_forward(x, self.down.to(x.dtype), None), self.up.to(x.dtype), self.bias)
        return branch + self._conv_forward(self.input_quantizer(x), self.effective_weight(), None)


class QuantizedLinear(QuantizedLayer, nn.Linear):
    """Linear layer whose weight and input are quantised."""

    @property
    def dynamic_dim(self) -> int | None:
        return -1

    def forward(self, x: Tensor) -> Tensor:
        if not self.rank:
            return F.linear(self.input_quantizer(x), self.effective_weight(), self.bias)
        x = (x / self.smoothing).to(x.dtype)
        branch = F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype), self.bias)
        return branch + F.linear(self.input_quantizer(x), self.effective_weight())


def quantized_layer(
    layer: nn.Conv2d | nn.Linear,
    weight_bits: int,
    activation_bits: int,
    tracker: StepTracker,
    splits: tuple[int, ...] = (),
    symmetric: bool = False,
    dynamic: bool = False,
    rank: int = 0,
) -> QuantizedConv2d | QuantizedLinear:
    """The quantised twin of ``layer``, sharing its parameters (weights not yet quantised)."""
    if isinstance(layer, nn.Conv2d):
        same = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
        options = {name: getattr(layer, name) for name in same}
        twin: QuantizedConv2d | QuantizedLinear = QuantizedConv2d(**options, bias=layer.bias is not None, device="meta")
    else:
        twin = QuantizedLinear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    twin.weight, twin.bias = layer.weight, layer.bias
    splits = splits or (layer.weight.shape[1],)
    twin.set_up(weight_bits, activation_bits, splits, symmetric, dynamic, rank, tracker)
    return twin
