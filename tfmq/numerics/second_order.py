"""Rounding by second-order statistics, in closed form.

A layer y = W x + b is to keep its full-precision output y~ where its inputs x carry the mistakes of the layers before.
With H = sum x x^T over samples and P = sum (y~ - y) x^T, the weight that does so best, and stays near W along
directions that the samples do not show, is

    W* = W + P (H + l I)^-1,   l = damping * mean of H's diagonal                                (least squares)

and rounding it to codes q on its grid costs tr (W* - W_q) (H + l I) (W* - W_q)^T. Functions below take the damped
H + l I as H: few samples show some directions by chance alone, and rounding would lean on them. With H = R^T R, R upper
triangular, the cost is a sum over columns from the last to the first, in each of which the best code is known once
those after it are fixed:

    q_i = round(w_i + sum_{j > i} R_ij / R_ii (w_j - w_hat_j))

This is GPTQ (Frantar et al. 2023, arXiv 2210.17323), written as Babai's nearest plane algorithm, which needs no inverse
of H (Chen et al. 2025, arXiv 2507.18553); GPTAQ (arXiv 2504.02692) rounds against full-precision outputs as well. Its
codes are not yet the best ones, nor is the scale: given all other codes of a channel, the best i-th value is
w_hat_i + (w* - w_hat) H_i / H_ii, rounded (`best_codes`), and given all codes less zero points c, the best scale is
w* H c / c H c (`best_scales`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

from tfmq.numerics.affine import SMALLEST_SCALE, Grid, affine_from_range, dequantize, quantize

BLOCK = 128
SHRINKS = [1 - 0.03 * i for i in range(20)]


@dataclass
class SecondMoments:
    """Sums over samples of a layer's inputs x (n, D), and of what its outputs lack, e = y~ - y (n, O).

    Attributes:
        count: of samples.
        inputs, lacking: sum of x (D,), of e (O,).
        squares: sum of x x^T (D, D).
        products: sum of e x^T (O, D).
    """

    count: int
    inputs: Tensor
    lacking: Tensor
    squares: Tensor
    products: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> SecondMoments:
        """Those of no samples, for a weight (O, ...)."""
        outputs, inputs = weight.flatten(1).shape
        sums = [weight.new_zeros(shape) for shape in ((inputs,), (outputs,), (inputs,) * 2, (outputs, inputs))]
        return cls(0, *sums)

    def add(self, x: Tensor, lacking: Tensor | None) -> None:
        """Add samples; without what the outputs lack, of the inputs alone."""
        self.count += len(x)
        self.inputs += x.sum(0)
        self.squares.addmm_(x.T, x)
        if lacking is not None:
            self.lacking += lacking.sum(0)
            self.products.addmm_(lacking.T, x)

    def add_convolution(
        self,
        x: Tensor,
        lacking: Tensor | None,
        kernel: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
    ) -> None:
        """Add what a convolution of images x (N, C, H, W) sees, at every place of its output (N, O, H', W')."""
        if kernel == (1, 1) and stride == (1, 1) and padding == (0, 0):
            self.add(_by_place(x), None if lacking is None else _by_place(lacking))
            return
        if stride == (1, 1):
            places, inputs, squares = patch_moments(x, kernel, padding)
            self.count += places
            self.inputs += inputs
            self.squares += squares
        else:
            patches = F.unfold(x, kernel, padding=padding, stride=stride)
            self.add(patches.transpose(1, 2).flatten(0, 1), None)
        if lacking is not None:
            self.lacking += lacking.sum((0, 2, 3))
            shape = (lacking.shape[1], x.shape[1], *kernel)
            self.products += conv2d_weight(x, shape, lacking, stride, padding).flatten(1)

    def centred(self) -> tuple[Tensor, Tensor]:
        """sum (x - mean)(x - mean)^T and sum (e - mean)(x - mean)^T: where a bias takes up the means."""
        mean = self.inputs / self.count
        return self.squares - torch.outer(self.inputs, mean), self.products - torch.outer(self.lacking, mean)


def _by_place(images: Tensor) -> Tensor:
    """(N, C, H, W) as (N H W, C)."""
    return images.permute(0, 2, 3, 1).flatten(0, 2)


def patch_moments(x: Tensor, kernel: tuple[int, int], padding: tuple[int, int]) -> tuple[int, Tensor, Tensor]:
    """Of the patches that a convolution of stride 1 sees in x (N, C, H, W): how many, sum, and sum of outer products.

    The product of two taps is that of two pixels at the distance of the taps. All pairs of taps of one distance so have
    one sum over pixels in common, but for some rows and columns at the border, which are taken off: of a kernel of
    3 x 3 there are 13 sums instead of 81.
    """
    count, channels, height, width = x.shape
    down, across = (_Taps(*each) for each in zip((height, width), kernel, padding, strict=True))
    pixels = x.permute(2, 3, 0, 1).contiguous()
    taps = kernel[0] * kernel[1]
    squares = x.new_zeros(taps, taps, channels, channels)
    for dy, dx in product(range(kernel[0]), range(1 - kernel[1], kernel[1])):
        if (dy, dx) < (0, 0):
            continue
        part = _shifted_products(pixels, dy, dx)
        for (i, rows), (j, columns) in product(down.missing(dy), across.missing(dx)):
            all_rows, all_columns = down.overlap(dy), across.overlap(dx)
            sums = part(all_rows, all_columns) - part(rows, all_columns) - part(all_rows, columns) + part(rows, columns)
            first, second = i * kernel[1] + j, (i + dy) * kernel[1] + j + dx
            squares[first, second] = sums
            squares[second, first] = sums.T
    sums = pixels.sum(2)
    inputs = torch.stack(
        [sums[down.seen(i)][:, across.seen(j)].sum((0, 1)) for i, j in product(range(kernel[0]), range(kernel[1]))], 1
    )
    size = channels * taps
    places = count * down.outputs * across.outputs
    return places, inputs.flatten(), squares.permute(2, 0, 3, 1).reshape(size, size)


@dataclass(frozen=True)
class _Taps:
    """The taps of a kernel along one side of an image."""

    size: int
    taps: int
    padding: int

    @property
    def outputs(self) -> int:
        return self.size + 2 * self.padding - self.taps + 1

    def seen(self, tap: int) -> list[int]:
        """Pixels that a tap sees."""
        first = tap - self.padding
        return list(range(max(first, 0), min(first + self.outputs, self.size)))

    def overlap(self, distance: int) -> tuple[int, ...]:
        """Pixels that have another one at a distance."""
        return tuple(range(max(0, -distance), min(self.size, self.size - distance)))

    def missing(self, distance: int) -> list[tuple[int, tuple[int, ...]]]:
        """Each tap that has another one at a distance, with the pixels of ``overlap`` that it does not see."""
        first, last = max(0, -distance), min(self.taps, self.taps - distance)
        return [(tap, tuple(sorted({*self.overlap(distance)} - {*self.seen(tap)}))) for tap in range(first, last)]


def _shifted_products(pixels: Tensor, dy: int, dx: int) -> Callable[[tuple[int, ...], tuple[int, ...]], Tensor]:
    """Gives sums over some rows and columns of x_q x_(q + (dy, dx))^T (C, C), for pixels (H, W, N, C)."""
    known: dict[tuple[tuple[int, ...], tuple[int, ...]], Tensor] = {}

    def part(rows: tuple[int, ...], columns: tuple[int, ...]) -> Tensor:
        if (rows, columns) not in known:
            channels = pixels.shape[3]
            if rows and columns:
                here, there = _at(pixels, rows, columns), _at(pixels, [r + dy for r in rows], [c + dx for c in columns])
                known[rows, columns] = here.T @ there
            else:
                known[rows, columns] = pixels.new_zeros(channels, channels)
        return known[rows, columns]

    return part


def _at(pixels: Tensor, rows: Sequence[int], columns: Sequence[int]) -> Tensor:
    """Pixels (H, W, N, C) at some rows and columns, as (n, C); those that are adjacent without a copy of their own."""
    for dim, places in enumerate((rows, columns)):
        if places[-1] - places[0] == len(places) - 1:
            pixels = pixels.narrow(dim, places[0], len(places))
        else:
            pixels = pixels.index_select(dim, torch.tensor(places, device=pixels.device))
    return pixels.flatten(0, 2)


def damped(squares: Tensor, damping: float) -> Tensor:
    """H + l I. An input that is always 0 gets the mean diagonal, which leaves its weights where they are."""
    diagonal = squares.diagonal()
    mean = diagonal.mean().clamp_min(torch.finfo(squares.dtype).tiny)
    return squares + torch.diag(damping * mean + torch.where(diagonal > 0, 0.0, 1.0) * mean)


def least_squares(weight: Tensor, squares: Tensor, products: Tensor) -> Tensor:
    """W* (O, D) for a weight W (O, D), the damped H (D, D) and P (O, D); float32."""
    factor = torch.linalg.cholesky(squares)
    return weight + torch.cholesky_solve(products.T, factor).T


def weighted_range(weight: Tensor, importance: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point (O,) with the smallest sum of importance (D,) times squared error, of 20 shrunken ranges.

    Zero points are those of unsigned codes.
    """
    low, high = weight.amin(1).clamp_max(0), weight.amax(1).clamp_min(0)
    grid, best = Grid.unsigned(bits), torch.full_like(low, torch.inf)
    scale, zero_point = torch.empty_like(low), torch.empty_like(low)
    for shrink in SHRINKS:
        tried, point = affine_from_range(shrink * low, shrink * high, bits, symmetric)
        if symmetric:
            point = torch.full_like(point, 2 ** (bits - 1))
        error = dequantize(quantize(weight, tried[:, None], point[:, None], grid), tried[:, None], point[:, None])
        error = error.sub_(weight).square_() @ importance
        better = error < best
        best = torch.where(better, error, best)
        scale, zero_point = torch.where(better, tried, scale), torch.where(better, point, zero_point)
    return scale, zero_point


def nearest_plane(weight: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid, squares: Tensor) -> Tensor:
    """Integer codes (O, D), as floats, of a weight (O, D) whose scales and zero points (O, D) are given.

    Inputs of the largest second moment are rounded first, while there are others to make up for it.
    """
    order = torch.argsort(squares.diagonal(), stable=True)
    factor = torch.linalg.cholesky(squares[order][:, order]).mT  # upper: H = R^T R needs R = L^T
    factor = (factor / factor.diagonal()[:, None]).contiguous()
    weight, scale, zero_point = (each.T[order].contiguous() for each in (weight, scale, zero_point))
    codes, errors = torch.empty_like(weight), torch.zeros_like(weight)
    for end in range(len(weight), 0, -BLOCK):
        start = max(0, end - BLOCK)
        inside = slice(start, end)
        wanted = torch.addmm(weight[inside], factor[inside, end:], errors[end:])
        within, found = factor[inside, inside], errors[inside]
        columns = zip(
            *(each.unbind() for each in (wanted, weight[inside], scale[inside], zero_point[inside])), strict=True
        )
        for i, (value, own, step, point) in reversed([*enumerate(columns)]):
            # In place, since these are small tensors, and many.
            value.addmv_(found[i + 1 :].T, within[i, i + 1 :])
            code = torch.div(value, step, out=codes[start + i]).round_().add_(point).clamp_(grid.qmin, grid.qmax)
            torch.sub(point, code, out=found[i]).mul_(step).add_(own)
    return codes[torch.argsort(order)].T.contiguous()


def rounding_cost(weight: Tensor, rounded: Tensor, squares: Tensor) -> Tensor:
    """(w - w_hat) H (w - w_hat)^T of each output channel (O,)."""
    error = weight - rounded
    return (error @ squares * error).sum(1)


def best_codes(weight: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid, squares: Tensor) -> Tensor:
    """Codes (O, D) after each was made the best one, given the others, once; all arguments as in ``nearest_plane``."""
    order = torch.argsort(squares.diagonal(), descending=True, stable=True)
    squares = squares[order][:, order].contiguous()
    weight, codes, scale, zero_point = (each.T[order].contiguous() for each in (weight, codes, scale, zero_point))
    diagonal = squares.diagonal()[:, None]
    slopes = squares @ (weight - dequantize(codes, scale, zero_point))
    codes_by_slope = torch.where(diagonal > 0, 1 / (diagonal * scale), 0.0)
    for start in range(0, len(weight), BLOCK):
        inside = slice(start, start + BLOCK)
        within, moved = squares[inside, inside], torch.zeros_like(codes[inside])
        parts = (slopes[inside], codes[inside], codes_by_slope[inside], scale[inside], moved)
        for i, (slope, code, by_slope, step, move) in enumerate(zip(*(each.unbind() for each in parts), strict=True)):
            slope.addmv_(moved[:i].T, within[i, :i], alpha=-1)
            torch.mul(slope, by_slope, out=move).round_().add_(code).clamp_(grid.qmin, grid.qmax).sub_(code)
            code.add_(move)
            move.mul_(step)
        slopes[start + BLOCK :].addmm_(squares[start + BLOCK :, inside], moved, alpha=-1)
    return codes[torch.argsort(order)].T.contiguous()


def best_scales(weight: Tensor, centred: Tensor, scale: Tensor, splits: tuple[int, ...], squares: Tensor) -> Tensor:
    """Scales (O, groups) that are best for codes less zero points (O, D), one group of inputs after the other."""
    scale, start = scale.clone(), 0
    error = weight - centred * scale.repeat_interleave(
        torch.tensor(splits, device=scale.device), 1, output_size=sum(splits)
    )
    for group, size in enumerate(splits):
        columns = slice(start, start + size)
        own = centred[:, columns]
        below = (own @ squares[columns, columns] * own).sum(1)
        change = (own * (error @ squares[:, columns])).sum(1) / below
        better = (below > 0) & (scale[:, group] + change > SMALLEST_SCALE)
        change = torch.where(better, change, 0.0)
        scale[:, group] += change
        error[:, columns] -= own * change[:, None]
        start += size
    return scale
