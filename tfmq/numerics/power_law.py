"""Whether values follow a power law: likelihood ratios against a uniform and a normal distribution.

Of n values between a and b, each density is taken at its maximum-likelihood parameters:

    power law   p(x) = (k - 1) x^-k / (a^(1 - k) - b^(1 - k)) on [a, b], with the exponent k
    uniform     p(x) = 1 / (b - a) on [a, b]
    normal      p(x) = exp(-(x - m)^2 / (2 v)) / sqrt(2 pi v)

The ratio of two of them is judged by Vuong's test (Econometrica 57, 1989), as for power laws in Clauset, Shalizi and
Newman (arXiv 0706.1062, appendix C): with d_i the differences of the log-likelihoods of each value,
z = sum d_i / (sqrt(n) deviation(d)) is standard normal where both densities are equally far from the truth.

All functions take values along the last dimension; the others are tests of their own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Halvings of an interval of exponents: the last is below the rounding of float64.
BISECTIONS = 80
STEEPEST = 1e6


def power_law_exponent(x: Tensor) -> Tensor:
    """The exponent k of largest likelihood of a power law on [min x, max x], for positive ``x`` (..., n).

    With u = log(x / a) and L = log(b / a), u has the density (k - 1) exp(-(k - 1) u) / (1 - exp(-(k - 1) L)) on [0, L],
    and the likelihood is largest where the mean of u is that of the density, 1 / (k - 1) - L / (exp((k - 1) L) - 1):
    it falls from L to 0 as k rises, so that k is found by bisection. The exponent of a uniform distribution is 0.
    """
    low, high = x.amin(-1), x.amax(-1)
    length = (high / low).log()
    share = (x / low[..., None]).log().mean(-1) / length
    left, right = torch.full_like(share, -STEEPEST), torch.full_like(share, STEEPEST)
    for _ in range(BISECTIONS):
        middle = (left + right) / 2
        above = _mean_share(middle) > share
        left, right = torch.where(above, middle, left), torch.where(above, right, middle)
    return 1 + (left + right) / 2 / length


def _mean_share(steepness: Tensor) -> Tensor:
    """The mean of u / L at (k - 1) L: 1 / z - 1 / (exp(z) - 1), which is 1 / 2 - z / 12 near 0."""
    safe = torch.where(steepness.abs() < 1e-4, torch.ones_like(steepness), steepness)
    return torch.where(steepness.abs() < 1e-4, 0.5 - steepness / 12, 1 / safe - 1 / torch.expm1(safe))


def power_law_log_likelihood(x: Tensor) -> Tensor:
    """log p(x) of each value (..., n), at the exponent of largest likelihood."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    u, length = (x / low).log(), (high / low).log()
    slope = power_law_exponent(x)[..., None] - 1
    size = (slope * length).abs()
    # log(z / (1 - exp(-z))) at z = slope L of either sign is log(|z| / (1 - exp(-|z|))), plus z where z is below 0.
    safe = torch.where(size < 1e-8, torch.ones_like(size), size)
    normalizer = torch.where(size < 1e-8, 0, (safe / -torch.expm1(-safe)).log()) + (slope * length).clamp_max(0)
    return normalizer - length.log() - slope * u - x.log()


def uniform_log_likelihood(x: Tensor) -> Tensor:
    """log p(x) of each value (..., n) of a uniform distribution between the smallest and the largest."""
    return -(x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)).log().expand_as(x)


def normal_log_likelihood(x: Tensor) -> Tensor:
    """log p(x) of each value (..., n) of a normal distribution with their mean and variance."""
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return -0.5 * (centred.square() / variance + (2 * math.pi * variance).log())


def vuong_statistic(first: Tensor, second: Tensor) -> Tensor:
    """z of two densities, from the log-likelihoods (..., n) of the same values: above 0 where the first fits better.

    0 where they do not differ.
    """
    difference = first - second
    deviation = difference.std(-1, correction=0)
    z = difference.mean(-1) * math.sqrt(difference.shape[-1]) / deviation
    return torch.where(deviation > 0, z, torch.zeros_like(z))


def follows_power_law(x: Tensor, significance: float) -> Tensor:
    """Whether a falling power law fits positive values (..., n) significantly better than both alternatives.

    Tests are one-sided, at the given ``significance``. A law that rises, of an exponent below 0, counts as none, since
    there is least of what is small; and values that are all the same follow none.
    """
    x = x.double()
    constant = x.amin(-1) == x.amax(-1)
    spread = torch.where(constant[..., None], torch.linspace(1, 2, x.shape[-1], dtype=x.dtype, device=x.device), x)
    law = power_law_log_likelihood(spread)
    alternatives = (uniform_log_likelihood(spread), normal_log_likelihood(spread))
    z = torch.stack([vuong_statistic(law, other) for other in alternatives]).amin(0)
    falls = power_law_exponent(spread) > 0
    return (0.5 * torch.erfc(z / math.sqrt(2)) < significance) & falls & ~constant
