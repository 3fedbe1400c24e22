"""95 % intervals of a cell's numbers over its images; everything that the images are compared with is held fixed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benchmarks.suite.record import Value

if TYPE_CHECKING:
    from benchmarks.metrics import Evidence

REPLICATES = 1000


def left_out(count: int) -> int:
    """How many of `count` images each replicate leaves out: a tenth, and at least one."""
    return max(1, count // 10)


def kept_images(count: int, replicates: int, generator: torch.Generator) -> Tensor:
    """Random subsets of `count` images, as a float64 mask [replicates, count] of ones (kept) and zeros (left out)."""
    masks = torch.ones(replicates, count, dtype=torch.float64)
    order = torch.rand(replicates, count, generator=generator).argsort(dim=1)
    return masks.scatter_(1, order[:, : left_out(count)], 0.0)


def with_interval(estimate: float, replicates: Tensor, count: int) -> Value:
    """The estimate from `count` images with 1.96 standard errors to each side, from the metric on `kept_images`.

    This is the delete-d jackknife (Shao and Wu, 1989, Annals of Statistics 17): with k images kept and d left out, the
    variance of the estimate is k / d times that of the replicates. A bootstrap will not do, since it draws images
    twice, which changes how many different images a distance sees: for fewer images than features its standard error
    of a Frechet distance came out two to eight times too wide in simulation, and that of an inception score a quarter
    too narrow, where this one was within a third of the truth.

    The interval is one for the expected value of the metric at this number of images: the bias that Frechet distances
    and the inception score have at few images is part of the number.
    """
    left = left_out(count)
    margin = 1.96 * replicates.std().item() * ((count - left) / left) ** 0.5
    return Value(value=estimate, low=estimate - margin, high=estimate + margin, n=count)


def mean_with_interval(per_image: Tensor, generator: torch.Generator) -> Value:
    """The mean over images [N] with its interval."""
    values = per_image.double()
    masks = kept_images(len(values), REPLICATES, generator)
    return with_interval(values.mean().item(), masks @ values / masks.sum(dim=1), len(values))


def mean_of(
    per_image: Callable[[Evidence], Tensor | None],
) -> Callable[[Evidence, torch.Generator], Value | None]:
    """The `compute` of a metric that is the mean over images of ``per_image``; None where that is None."""

    def compute(evidence: Evidence, generator: torch.Generator) -> Value | None:
        values = per_image(evidence)
        return None if values is None else mean_with_interval(values, generator)

    return compute
