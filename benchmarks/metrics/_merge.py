"""The moments of many images from those of some at a time, so that their features are never all in memory."""

from collections.abc import Iterable

import torch

from benchmarks.metrics._frechet import Moments


def merge(parts: Iterable[Moments]) -> Moments:
    """Moments of all images from those of one part of them after the other; of a single part the very same numbers.

    The scatter matrix of two sets is the sum of theirs and of the outer product of the distance between their means,
    times n1 n2 / (n1 + n2) (Chan, Golub and LeVeque, 1983, eq. 2.1): unlike in sums of squares, nothing large cancels.
    """
    parts = iter(parts)
    found = next(parts)
    for part in parts:
        shift, count = part.mean - found.mean, found.count + part.count
        scatter = found.covariance * (found.count - 1) + part.covariance * (part.count - 1)
        scatter += torch.outer(shift, shift) * (found.count * part.count / count)
        found = Moments(found.mean + shift * (part.count / count), scatter / (count - 1), count)
    return found
