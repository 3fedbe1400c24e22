"""Kernel distance to samples of the full-precision model: the column that ranks.

The squared maximum mean discrepancy with the kernel (x.y / D + 1)^3, by its unbiased estimator (Binkowski et al., 2018,
arXiv:1801.01401). Unlike a Frechet distance it does not depend on the number of images, so it can rank small samples;
values slightly below zero are valid, and mean that no difference is seen. torch-fidelity averages it over subsets, as
`kid_data` does; all images are used here.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.metrics import Evidence, Metric, Value
from benchmarks.metrics._interval import REPLICATES, kept_images, with_interval

ENTRIES = 2**25  # 256 MiB in float64


def polynomial_kernel(a: Tensor, b: Tensor) -> Tensor:
    """Kernel matrix [N, M] of features [N, D] and [M, D]; float64."""
    return (a.double() @ b.double().T / a.shape[1] + 1) ** 3


def kernel_distances(features: Tensor, reference: Tensor, masks: Tensor) -> Tensor:
    """Unbiased squared discrepancy [R] of subsets of features [N, D], by masks [R, N], to a reference [M, D].

    No more than `ENTRIES` of a kernel matrix are in memory at once.
    """
    counts, reference_count = masks.sum(dim=1), len(reference)
    within = sum(((masks[:, rows] @ kernel) * masks).sum(dim=1) for rows, kernel in _others(features))
    blocks = _blocks(len(features), reference_count)
    means = torch.cat([polynomial_kernel(features[rows], reference).mean(dim=1) for rows in blocks])
    across = masks @ means / counts
    other = sum(kernel.sum() for _, kernel in _others(reference))
    return within / (counts * (counts - 1)) - 2 * across + other / (reference_count * (reference_count - 1))


def _others(features: Tensor) -> Iterator[tuple[slice, Tensor]]:
    # Some rows of the kernel matrix of features with themselves at a time, zero where an image meets itself.
    for rows in _blocks(len(features), len(features)):
        kernel = polynomial_kernel(features[rows], features)
        kernel[:, rows].fill_diagonal_(0)
        yield rows, kernel


def _blocks(rows: int, columns: int) -> list[slice]:
    height = max(1, ENTRIES // columns)
    return [slice(start, min(start + height, rows)) for start in range(0, rows, height)]


def compute(evidence: Evidence, generator: torch.Generator) -> Value | None:
    """Kernel distance of the pooled features to those of the full-precision reference samples; None without any."""
    if evidence.references.samples is None:
        return None
    features, reference = evidence.features.pooled, evidence.references.samples.pooled
    masks = kept_images(len(features), REPLICATES, generator)
    distances = kernel_distances(features, reference, torch.cat([torch.ones_like(masks[:1]), masks]))
    return with_interval(distances[0].item(), distances[1:], len(features))


METRIC = Metric(name="kid_fp", position=10, label="KID to FP", better="lower", digits=4, compute=compute)
