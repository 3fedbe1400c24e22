"""The Frechet distance between the Gaussians of two sets of features (Heusel et al., 2017, arXiv:1706.08500, eq. 6).

With means m and covariances S it is |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2), in float64 throughout. The last
trace is the sum of the roots of the eigenvalues of a symmetric matrix with the same spectrum as S1 S2, so that
singular covariances, as of fewer images than features, need no offset and leave no imaginary part.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.metrics._interval import kept_images, with_interval
from benchmarks.suite.record import Value

# Each replicate costs an eigenvalue problem. A standard error from 50 of them is itself known to 10 %.
REPLICATES = 50


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
    masks = kept_images(len(features), REPLICATES, generator)
    distances = _distances(features, reference, torch.cat([torch.ones_like(masks[:1]), masks]))
    return with_interval(distances[0].item(), distances[1:], len(features))


def _distances(features: Tensor, reference: Moments, masks: Tensor) -> Tensor:
    # One distance for each subset of the images, from masks [R, N].
    if features.shape[1] != len(reference.mean):
        raise ValueError(f"Features have {features.shape[1]} columns, but the reference has {len(reference.mean)}.")
    offsets = features.double() - reference.mean
    counts = masks.sum(dim=1)
    squared_shift = (masks @ offsets / counts[:, None]).square().sum(dim=1)
    trace = (masks @ offsets.square().sum(dim=1) - counts * squared_shift) / (counts - 1)
    trace_roots = _gram_trace_roots if len(features) < features.shape[1] else _covariance_trace_roots
    roots = trace_roots(offsets, reference.covariance, masks.bool())
    return (squared_shift + trace + reference.covariance.trace() - 2 * roots).clamp(min=0)


def _gram_trace_roots(offsets: Tensor, covariance: Tensor, masks: Tensor) -> Tensor:
    # With the centred features X [N, D], S1 S2 = X^T X S2 / (N - 1) has the non-zero eigenvalues of the N x N matrix
    # X S2 X^T / (N - 1): S2 needs no root, and a subset only picks rows and columns of one matrix.
    gram = offsets @ covariance @ offsets.T
    roots = []
    for mask in masks:
        part = gram[mask][:, mask]
        mean = part.mean(dim=0)
        centred = part - mean[:, None] - mean[None, :] + mean.mean()
        roots.append(_trace_root(centred / (len(part) - 1)))
    return torch.stack(roots)


def _covariance_trace_roots(offsets: Tensor, covariance: Tensor, masks: Tensor) -> Tensor:
    # S1 S2 has the eigenvalues of R S1 R with R = S2^(1/2), which is the covariance of the features times R. That of a
    # subset is computed from the few images that it leaves out.
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    scaled = offsets @ (vectors * eigenvalues.clamp(min=0).sqrt()) @ vectors.T
    total, second = scaled.sum(dim=0), scaled.T @ scaled
    roots = []
    for mask in masks:
        left, count = scaled[~mask], mask.sum()
        mean = (total - left.sum(dim=0)) / count
        roots.append(_trace_root((second - left.T @ left - count * torch.outer(mean, mean)) / (count - 1)))
    return torch.stack(roots)


def _trace_root(matrix: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(matrix).clamp(min=0).sqrt().sum()
