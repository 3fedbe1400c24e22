"""Rounding by second-order statistics, in closed form.

A layer y = W x + b is to keep its full-precision output y~ where its inputs x carry the mistakes of the layers before.
With H = sum x x^T over samples and S = sum y~ x^T, the weight that does so best, and stays near W along directions that
the samples do not show, is

    W* = (S + l W) (H + l I)^-1,   l = damping * mean of H's diagonal                            (least squares)

and rounding it to codes q on its grid costs tr (W* - W_q) H (W* - W_q)^T. With H = R^T R, R upper triangular, this is a
sum over columns from the last to the first, in each of which the best code is known once those after it are fixed:

    q_i = round(w_i + sum_{j > i} R_ij / R_ii (w_j - w_hat_j))

This is GPTQ (Frantar et al. 2023, arXiv 2210.17323), written as Babai's nearest plane algorithm, which needs no inverse
of H (Chen et al. 2025, arXiv 2507.18553).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tfmq.numerics.affine import Grid, dequantize, quantize

BLOCK = 128


@dataclass
class SecondMoments:
    """Sums over samples of a layer's inputs x (n, D) and wanted outputs y (n, O), bias included in y.

    Attributes:
        count: of samples.
        inputs, outputs: sum of x (D,), of y (O,).
        squares: sum of x x^T (D, D).
        products: sum of y x^T (O, D).
    """

    count: int
    inputs: Tensor
    outputs: Tensor
    squares: Tensor
    products: Tensor

    @classmethod
    def empty(cls, inputs: int, outputs: int, device: torch.device) -> SecondMoments:
        """Those of no samples."""
        sums = [
            torch.zeros(shape, device=device) for shape in ((inputs,), (outputs,), (inputs,) * 2, (outputs, inputs))
        ]
        return cls(0, *sums)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add samples."""
        self.count += len(x)
        self.inputs += x.sum(0)
        self.outputs += y.sum(0)
        self.squares.addmm_(x.T, x)
        self.products.addmm_(y.T, x)

    def centred(self) -> tuple[Tensor, Tensor]:
        """sum (x - mean)(x - mean)^T and sum (y - mean)(x - mean)^T: where a bias takes up the means."""
        mean = self.inputs / self.count
        return self.squares - torch.outer(self.inputs, mean), self.products - torch.outer(self.outputs, mean)


def damped(squares: Tensor, damping: float) -> Tensor:
    """H + l I. An input that is always 0 gets the mean diagonal, which leaves its weights where they are."""
    diagonal = squares.diagonal()
    mean = diagonal.mean().clamp_min(torch.finfo(squares.dtype).tiny)
    return squares + torch.diag(damping * mean + torch.where(diagonal > 0, 0.0, 1.0) * mean)


def least_squares(weight: Tensor, squares: Tensor, products: Tensor, damping: float) -> Tensor:
    """W* (O, D) for a weight W (O, D), H (D, D) and S (O, D); float32."""
    factor = torch.linalg.cholesky(damped(squares, damping))
    residual = products - weight @ squares
    return weight + torch.cholesky_solve(residual.T, factor).T


def nearest_plane(
    weight: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid, squares: Tensor, damping: float
) -> Tensor:
    """Integer codes (O, D), as floats, of a weight (O, D) whose scales and zero points (O, D) are given.

    Inputs of the largest second moment are rounded first, while there are others to make up for it.
    """
    order = torch.argsort(squares.diagonal(), stable=True)
    factor = torch.linalg.cholesky(damped(squares, damping)[order][:, order]).mT  # upper: H = R^T R needs R = L^T
    factor = factor / factor.diagonal()[:, None]
    weight, scale, zero_point = (each[:, order] for each in (weight, scale, zero_point))
    codes, errors = torch.empty_like(weight), torch.zeros_like(weight)
    for end in range(weight.shape[1], 0, -BLOCK):
        start = max(0, end - BLOCK)
        wanted = weight[:, start:end] + errors[:, end:] @ factor[start:end, end:].T
        within = factor[start:end, start:end]
        for i in range(end - start - 1, -1, -1):
            column = start + i
            value = wanted[:, i]
            if i + 1 < end - start:
                value = value + errors[:, column + 1 : end] @ within[i, i + 1 :]
            codes[:, column] = quantize(value, scale[:, column], zero_point[:, column], grid)
            errors[:, column] = weight[:, column] - dequantize(
                codes[:, column], scale[:, column], zero_point[:, column]
            )
    return codes[:, torch.argsort(order)]
