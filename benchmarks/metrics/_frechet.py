"""The Frechet distance between the Gaussians of two sets of features (Heusel et al., 2017, arXiv:1706.08500, eq. 6).

With means m and covariances S it is |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2), in float64 throughout. The last
trace is the sum of the roots of the eigenvalues of a symmetric matrix with the same spectrum as S1 S2, so that
singular covariances, as of fewer images than features, need no offset and leave no imaginary part.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.metrics._bootstrap import resampling_weights, with_interval
from benchmarks.record import Value

# A replicate costs an eigenvalue problem. The standard error of 100 replicates is itself known to 7 %.
REPLICATES = 100


@dataclass(frozen=True)
class Moments:
    """Mean [D] and unbiased covariance [D, D] of the features of `count` images; float64."""

    mean: Tensor
    covariance: Tensor
    count: int


def moments(features: Tensor) -> Moments:
    """Moments of features [N, D]; a ValueError for fewer than two rows."""
    if len(features) < 2:
        raise ValueError(f"A covariance needs two or more images; got features of shape {tuple(features.shape)}.")
    features = features.double()
    mean = features.mean(dim=0)
    centred = features - mean
    return Moments(mean, centred.T @ centred / (len(features) - 1), len(features))


def frechet_distance(features: Tensor, reference: Moments) -> float:
    """Frechet distance of features [N, D] to a reference; at least 0."""
    return _distances(features, reference, torch.ones(1, len(features), dtype=torch.float64)).item()


def frechet_with_interval(features: Tensor, reference: Moments, generator: torch.Generator) -> Value:
    """Frechet distance of features [N, D] to a reference, with its interval."""
    weights = resampling_weights(len(features), REPLICATES, generator)
    distances = _distances(features, reference, torch.cat([torch.ones_like(weights[:1]), weights]))
    return with_interval(distances[0].item(), distances[1:], len(features))


def _distances(features: Tensor, reference: Moments, weights: Tensor) -> Tensor:
    # One distance for each row of image counts [R, N].
    if features.shape[1] != len(reference.mean):
        raise ValueError(f"Features have {features.shape[1]} columns, but the reference has {len(reference.mean)}.")
    offsets = features.double() - reference.mean
    trace_roots = _gram_trace_roots if len(features) < features.shape[1] else _covariance_trace_roots
    count = len(features)
    means = weights @ offsets / count
    squared_shift = means.square().sum(dim=1)
    trace = (weights @ offsets.square().sum(dim=1) - count * squared_shift) / (count - 1)
    fixed = reference.covariance.trace()
    return (squared_shift + trace + fixed - 2 * trace_roots(offsets, reference.covariance, weights)).clamp(min=0)


def _gram_trace_roots(offsets: Tensor, covariance: Tensor, weights: Tensor) -> Tensor:
    # With the centred features X [N, D], S1 S2 = X^T X S2 / (N - 1) has the non-zero eigenvalues of the N x N matrix
    # X S2 X^T / (N - 1), where an image drawn w times can be one row times sqrt(w): S2 needs no root, and a replicate
    # only reweights one matrix.
    gram = offsets @ covariance @ offsets.T
    count = len(offsets)
    results = []
    for row in weights:
        drawn = row.nonzero().squeeze(1)
        part, times = gram[drawn][:, drawn], row[drawn]
        mean = part @ times / count
        centred = part - mean[:, None] - mean[None, :] + times @ mean / count
        root = times.sqrt()
        results.append(_trace_root(root[:, None] * centred * root[None, :] / (count - 1)))
    return torch.stack(results)


def _covariance_trace_roots(offsets: Tensor, covariance: Tensor, weights: Tensor) -> Tensor:
    # S1 S2 has the eigenvalues of R S1 R with R = S2^(1/2), which is the covariance of the features times R.
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    scaled = offsets @ (vectors * eigenvalues.clamp(min=0).sqrt()) @ vectors.T
    count = len(offsets)
    results = []
    for row in weights:
        centred = row.sqrt()[:, None] * (scaled - row @ scaled / count)
        results.append(_trace_root(centred.T @ centred / (count - 1)))
    return torch.stack(results)


def _trace_root(matrix: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(matrix).clamp(min=0).sqrt().sum()
