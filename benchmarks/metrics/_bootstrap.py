"""95 % intervals by the bootstrap: the cell's images are resampled, everything they are compared with is held fixed."""

import torch
from torch import Tensor

from benchmarks.record import Value

REPLICATES = 1000


def resampling_weights(count: int, replicates: int, generator: torch.Generator) -> Tensor:
    """How often each of `count` images occurs in each resample with replacement; float64 [replicates, count]."""
    drawn = torch.randint(count, (replicates, count), generator=generator)
    weights = torch.zeros(replicates, count, dtype=torch.float64)
    return weights.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))


def with_interval(estimate: float, replicates: Tensor, count: int) -> Value:
    """The estimate with 1.96 bootstrap standard errors to each side (Efron and Tibshirani, 1993, chapter 13).

    Quantiles of the replicates would not do: distances between distributions are biased upwards by an amount that grows
    as a sample has fewer different images, and a resample has a third fewer, so that the replicates of a Frechet
    distance can all lie above the estimate. Their spread is sound. The interval is thus one for the expected value of
    the metric at this number of images, bias included.
    """
    margin = 1.96 * replicates.std().item()
    return Value(value=estimate, low=estimate - margin, high=estimate + margin, n=count)


def mean_with_interval(per_image: Tensor, generator: torch.Generator) -> Value:
    """The mean over images [N] with its interval."""
    values = per_image.double()
    weights = resampling_weights(len(values), REPLICATES, generator)
    return with_interval(values.mean().item(), weights @ values / len(values), len(values))
