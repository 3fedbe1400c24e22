"""Sums of products of integer codes: the one arithmetic of quantised layers, by the kernels that a processor has.

With codes q_x, q_w and zero points z_x, z_w a quantised layer is

    y = s_x s_w[c] sum (q_x - z_x) (q_w - z_w[c]) + b[c],

an integer sum with one float factor. A sum of integers has no order, so that it depends neither on the batch, nor on
threads, nor on the kernel. On a CPU the sums are those of oneDNN's 8-bit operators, elsewhere of `torch._int_mm`, which
adds in 32 bits. What neither takes is summed in floating point, in parts that are small enough to be exact:

- TF32 has 11 significant bits, and so holds every integer up to 2^11. Centred codes are at most 255, products of two
  below 2^16, and float32, in which they are added, holds every integer up to 2^24.
- A sum is exact in whatever order it is taken if its terms' magnitudes add up to at most 2^24. The largest codes allow
  258 terms, 2^24 / 255^2; what a weight really allows follows from the sums of its magnitudes (`part_sizes`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from tfmq.modules.fake_quantize import FakeQuantize

EXACT = 2**24  # float32 holds every integer up to here,
TF32_EXACT = 2**11  # and TF32 up to here
INT32 = 2**31
UNITS = 1.5 * 2**23  # beside it, floats are the integers
IN_UNITS = torch.tensor(UNITS)
CACHED = 2**16  # floats that stay in the cache of a core
WINDOWS = 2**28  # bytes of the windows of a convolution that are written at a time
PACKINGS = 4  # shapes of the input that a weight is kept packed for


@dataclass(frozen=True)
class InputGrid:
    """The unsigned grid of an activation: codes 0 to ``last`` (at most 255), value = scale (code - zero_point).

    A signed grid is one whose zero point is half its codes. The zero point may lie outside the codes.
    """

    scale: float
    zero_point: int
    last: int

    @cached_property
    def largest(self) -> int:
        """The largest |code - zero point|."""
        return max(abs(self.zero_point), abs(self.last - self.zero_point))

    @cached_property
    def unscaled(self) -> InputGrid:
        """The same grid with integers as values."""
        return replace(self, scale=1.0)

    @cached_property
    def step(self) -> Tensor:
        """The scale as a tensor: a number would be made one in each operation, for longer than small ones take."""
        return torch.tensor(self.scale)

    def step_for(self, x: Tensor) -> Tensor:
        """The scale to divide ``x`` by, where it is: CUDA multiplies by the inverse of one that is on the CPU."""
        return self.step if x.device.type == "cpu" else x.new_full((), self.scale)

    def codes(self, x: Tensor, silu: bool = False, out: Tensor | None = None) -> Tensor:
        """The codes of ``x`` as uint8, in the order of its memory: clamp(round(x / scale) + zero_point).

        With ``silu`` those of its SiLU, for which ``x`` is overwritten.
        """
        if x.device.type != "cpu" or x.numel() <= CACHED:
            step = self.step_for(x)
            return self.codes_(F.silu(x, inplace=True).div_(step) if silu else torch.div(x, step), out=out)
        # So many at a time that what lies between stays in the cache of a core.
        x, order = in_memory(x)
        codes = torch.empty(x.shape, dtype=torch.uint8)
        scaled = torch.empty(0 if silu else CACHED)
        for given, found in zip(x.view(-1).split(CACHED), codes.view(-1).split(CACHED), strict=True):
            if silu:
                F.silu(given, inplace=True).div_(self.step)
            self.codes_(given if silu else torch.div(given, self.step, out=scaled[: len(given)]), out=found)
        return codes.permute(order)

    def codes_(self, scaled: Tensor, factor: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """The codes of ``x / scale``, or of a ``factor`` times it, in whose memory they are worked out.

        Beside 1.5 * 2^23 floats are a unit apart: adding that rounds, half to even, and leaves the integer in the last
        bits of the float. This takes half the time of rounding and converting.
        """
        if out is None:
            out = torch.empty_like(scaled, dtype=torch.uint8)
        if abs(self.zero_point) + self.last >= 2**22:
            scaled = scaled if factor is None else scaled.mul_(factor)
            return out.copy_(scaled.round_().add_(self.zero_point).clamp_(0, self.last))
        low = UNITS - self.zero_point
        if factor is None:
            scaled.add_(IN_UNITS)
        else:
            # In the place of a number, since each row has one already: torch's loops over two are slow.
            torch.addcmul(scaled.new_full((1, scaled.shape[-1]), UNITS), scaled, factor, out=scaled)
        out.copy_(scaled.clamp_(low, low + self.last).view(torch.int32))
        return out.add_(self.zero_point % 256) if self.zero_point % 256 else out

    def centred(self, x: Tensor) -> Tensor:
        """code - zero point of ``x``, as float32."""
        return self.centred_(torch.div(x, self.step_for(x)))

    def centred_(self, scaled: Tensor) -> Tensor:
        """code - zero point of ``x / scale``, in place."""
        return scaled.round_().clamp_(-self.zero_point, self.last - self.zero_point)


def input_grids(quantizer: FakeQuantize) -> tuple[InputGrid, ...]:
    """The grid of an activation quantiser: one, or one for each of the tracker's steps."""
    count = len(quantizer.scale)
    widths = [quantizer.bits] * count if quantizer.step_bits is None else quantizer.step_bits.tolist()
    grids = []
    for bits, scale, point in zip(widths, quantizer.scale.tolist(), quantizer.zero_point.tolist(), strict=True):
        shift = 2 ** (bits - 1) if quantizer.symmetric else 0
        grids.append(InputGrid(scale, int(point) + shift, 2**bits - 1))
    return tuple(grids)


def in_memory(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """``x`` with its dimensions in the order of its memory, made contiguous, and the order that they came in."""
    if x.dim() == 4 and x.stride(1) == 1 and not x.is_contiguous():
        return x.permute(0, 2, 3, 1).contiguous(), (0, 3, 1, 2)  # of channels-last memory, or a part of its channels
    return x.contiguous(), tuple(range(x.dim()))


@dataclass(frozen=True)
class Window:
    """How a convolution moves over its input; None in its place means a linear layer."""

    size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @cached_property
    def is_point(self) -> bool:
        """Whether the output's pixels are those of the input, one by one."""
        return (self.size, self.stride, self.padding) == ((1, 1), (1, 1), (0, 0))

    @cached_property
    def pools(self) -> bool:
        """Whether pooling can take sums over the same windows."""
        padded = all(2 * pixels <= side for pixels, side in zip(self.padding, self.size, strict=True))
        return padded and self.dilation == (1, 1)

    @cached_property
    def lists(self) -> tuple[list[int], list[int], list[int], int]:
        """As operators take it: with one group of channels."""
        return list(self.stride), list(self.padding), list(self.dilation), 1


class Packed:
    """A signed 8-bit weight in the layouts of oneDNN, packed when first needed.

    Of a convolution one for each shape of its input: a layout that was chosen without it makes a convolution five times
    slower. Linear layers have one for all.
    """

    def __init__(self, weight: Tensor, window: Window | None) -> None:
        self.weight = weight
        self.window = window
        self.no_points = torch.zeros(len(weight), dtype=torch.int32)  # others are silently ignored by the operators
        self.packed: dict[torch.Size | None, Tensor] = {}

    def __deepcopy__(self, memo: dict[int, object]) -> Packed:
        return Packed(self.weight, self.window)

    def __reduce__(self) -> tuple[type[Packed], tuple[Tensor, Window | None]]:
        return Packed, (self.weight, self.window)

    def of(self, shape: torch.Size) -> Tensor:
        key = None if self.window is None else shape
        found = self.packed.get(key)
        if found is None:
            found = self._pack(shape)
            # A new dictionary each time, so that threads need not wait for each other.
            kept = list(self.packed.items())[1 - PACKINGS :]
            self.packed = dict(kept) | {key: found}
        return found

    def _pack(self, shape: torch.Size) -> Tensor:
        if self.window is None:
            return torch.ops.onednn.qlinear_prepack(self.weight, None)
        ones = torch.ones(len(self.weight))
        # Whether the input has a zero point counts here, its value does not.
        return torch.ops.onednn.qconv_prepack(self.weight, ones, 1.0, 1, *self.window.lists, list(shape))

    def product(self, codes: Tensor, grid: InputGrid, scale: Tensor, bias: Tensor | None) -> Tensor:
        """grid.scale scale[c] sum (codes - zero point) weight[c] + bias[c], float32.

        Args:
            codes: uint8 (N, C, H, W) in channels-last order, or (N, C).
        """
        # One factor: of two, kernels for few rows and for many take the product in another order.
        return self.scaled(codes, grid.zero_point, grid.scale * scale, bias)

    def scaled(self, codes: Tensor, zero_point: int, factor: Tensor, bias: Tensor | None) -> Tensor:
        """factor[c] sum (codes - zero point) weight[c] + bias[c], float32."""
        operands = codes, 1.0, zero_point, self.of(codes.shape), factor, self.no_points, bias
        as_floats: tuple[object, ...] = 1.0, 0, torch.float32, "none", [], ""
        if self.window is None:
            return torch.ops.onednn.qlinear_pointwise(*operands, *as_floats)
        return torch.ops.onednn.qconv2d_pointwise(*operands, *self.window.lists, *as_floats)


class Unpacked(Packed):
    """A signed 8-bit matrix (C, O) that is multiplied only a few times: left in its own order.

    oneDNN's 8-bit kernels rearrange a part of it as they go, which takes far less time than packing all of it.
    """

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(matrix.t(), None)

    def _pack(self, shape: torch.Size) -> Tensor:
        return self.weight.t().to_mkldnn()


@cache
def cpu_is_exact() -> bool:
    """Whether this processor's 8-bit kernels add exactly: those without VNNI instructions saturate in 16 bits."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.onednn, "qconv2d_pointwise"):
        return False
    grid, scale = InputGrid(1.0, 0, 255), torch.ones(32)
    codes = torch.full((32, 64, 4, 4), 255, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    weight = torch.full((32, 64, 3, 3), 127, dtype=torch.int8)
    window = Window((3, 3), (1, 1), (0, 0), (1, 1))
    convolved = Packed(weight, window).product(codes, grid, scale, None)
    multiplied = Packed(weight[:, :, 0, 0].contiguous(), None).product(
        codes[:, :, 0, 0].contiguous(), grid, scale, None
    )
    term = 64 * 255 * 127
    return bool((convolved == 9 * term).all() and (multiplied == term).all())


def part_sizes(magnitudes: Tensor, largest: int) -> list[int]:
    """How many input channels at a time can be summed so that terms' magnitudes add up to at most 2^24.

    One channel is the least: with codes of a byte, that is exact for windows of up to 258 pixels.

    Args:
        magnitudes: int64 (O, C), what the magnitudes of a weight add up to over the window.
        largest: magnitude of the input.
    """
    reached = (magnitudes * largest).cumsum(1)
    sizes, start = [], 0
    while start < reached.shape[1]:
        before = reached[:, start - 1] if start else reached.new_zeros(len(reached))
        most = (reached[:, start:] - before[:, None]).amax(0)
        sizes.append(max(1, int((most <= EXACT).sum())))
        start += sizes[-1]
    return sizes


def exact_parts(centred: Tensor, weight: Tensor, window: Window | None, sizes: list[int], largest: int) -> Tensor:
    """sum centred weight in floating point, over parts of the channels whose sums are exact; TF32 is let in on CUDA.

    Args:
        centred: float32 (N, C, H, W) or (N, C), integers.
        weight: float32 (O, C, k, k) or (O, C), integers.
        sizes: of the parts, by `part_sizes`.
        largest: magnitude in either.
    """
    with tensor_cores(centred, largest):
        parts = zip(centred.split(sizes, 1), weight.split(sizes, 1), strict=True)
        first, *others = (_product(piece, part, window) for piece, part in parts)
    for other in others:
        first += other
    return first


def _product(x: Tensor, weight: Tensor, window: Window | None) -> Tensor:
    return F.linear(x, weight) if window is None else F.conv2d(x, weight, None, *window.lists)


def exact_bmm(a: Tensor, b: Tensor, largest: int, most: float) -> Tensor:
    """``torch.bmm`` of integers of at most ``largest`` in floating point, exact: in parts where a sum may pass 2^24.

    Args:
        a, b: float32 (N, I, K) and (N, K, J).
        most: what no sum of absolute products exceeds.
    """
    size = a.shape[2] if most < EXACT else max(1, EXACT // largest**2)
    with tensor_cores(a, largest):
        first, *others = (torch.bmm(*parts) for parts in zip(a.split(size, 2), b.split(size, 1), strict=True))
    for other in others:
        first += other
    return first


@contextmanager
def tensor_cores(operand: Tensor, largest: float) -> Iterator[None]:
    """On CUDA, products inside run in TF32 if that holds integers of at most ``largest``, and else in float32."""
    if not operand.is_cuda:
        yield
        return
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = largest <= TF32_EXACT
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def int_mm(codes: Tensor, zero_point: int, weight: Tensor) -> Tensor:
    """sum (codes - zero_point) weight by ``torch._int_mm``: uint8 (N, C) and int8 (O, C) -> int32 (N, O)."""
    return _int_mm(_signed(codes), zero_point, weight)


def _signed(codes: Tensor) -> Tensor:
    """code - 128 as int8: another first bit."""
    return codes.bitwise_xor(128).view(torch.int8)


def _int_mm(shifted: Tensor, zero_point: int, weight: Tensor) -> Tensor:
    """`int_mm` of codes - 128.

    CUDA takes more than 16 rows, and numbers of channels that are multiples of 8: others are filled up with zeros.
    """
    rows, channels, outputs = len(shifted), -shifted.shape[1] % 8, -len(weight) % 8
    if channels or rows <= 16:
        shifted = F.pad(shifted, (0, channels, 0, max(0, 17 - rows)))
    if channels or outputs:
        weight = F.pad(weight, (0, channels, 0, outputs))
    sums = torch._int_mm(shifted, weight.t()).add_((128 - zero_point) * weight.sum(1, dtype=torch.int32))
    return sums[:rows, : sums.shape[1] - outputs]


def int_conv(codes: Tensor, zero_point: int, weight: Tensor, window: Window) -> Tensor:
    """`int_mm` over the windows of images: uint8 (N, C, H, W) and int8 (O, C, k, k) -> int32 (N, O, H', W').

    The zero point is a code, which pads. Windows are written out, those of some images at a time.
    """
    (down, across), (tall, wide) = window.padding, window.size
    pixels = _signed(codes.permute(0, 2, 3, 1))
    if down or across:
        pixels = F.pad(pixels, (0, 0, across, across, down, down), value=zero_point - 128)
    pixels = pixels.contiguous()
    images, height, width, channels = pixels.shape
    of_image, of_row, of_pixel, _ = pixels.stride()
    height = (height - window.dilation[0] * (tall - 1) - 1) // window.stride[0] + 1
    width = (width - window.dilation[1] * (wide - 1) - 1) // window.stride[1] + 1
    steps = of_image, of_row * window.stride[0], of_pixel * window.stride[1]
    within = of_row * window.dilation[0], of_pixel * window.dilation[1], 1
    windows = pixels.as_strided((images, height, width, tall, wide, channels), (*steps, *within))
    matrix = weight.permute(0, 2, 3, 1).flatten(1)
    at_once = max(1, WINDOWS // (height * width * matrix.shape[1]))
    parts = [_int_mm(some.reshape(-1, matrix.shape[1]), zero_point, matrix) for some in windows.split(at_once)]
    return torch.cat(parts).view(images, height, width, len(weight)).permute(0, 3, 1, 2)
