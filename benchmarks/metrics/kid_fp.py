"""Kernel distance to samples of the full-precision model: the column that ranks.

The squared maximum mean discrepancy with the kernel (x.y / D + 1)^3, by its unbiased estimator (Binkowski et al., 2018,
arXiv:1801.01401). Unlike a Frechet distance it does not depend on the number of images, so it can rank small samples;
values slightly below zero are valid, and mean that no difference is seen. torch-fidelity averages it over subsets; all
images are used at once here.
"""

import torch
from torch import Tensor

from benchmarks.metrics import Evidence, Metric, Value
from benchmarks.metrics._interval import REPLICATES, kept_images, with_interval


def polynomial_kernel(a: Tensor, b: Tensor) -> Tensor:
    """Kernel matrix [N, M] of features [N, D] and [M, D]; float64."""
    return (a.double() @ b.double().T / a.shape[1] + 1) ** 3


def kernel_distances(features: Tensor, reference: Tensor, masks: Tensor) -> Tensor:
    """Unbiased squared discrepancy [R] of subsets of features [N, D], by masks [R, N], to a reference [M, D]."""
    counts, reference_count = masks.sum(dim=1), len(reference)
    own = polynomial_kernel(features, features).fill_diagonal_(0)
    within = ((masks @ own) * masks).sum(dim=1) / (counts * (counts - 1))
    across = masks @ polynomial_kernel(features, reference).mean(dim=1) / counts
    other = polynomial_kernel(reference, reference).fill_diagonal_(0)
    return within - 2 * across + other.sum() / (reference_count * (reference_count - 1))


def compute(evidence: Evidence, generator: torch.Generator) -> Value:
    """Kernel distance of the pooled features to those of the full-precision reference samples."""
    features, reference = evidence.features.pooled, evidence.reference_features.pooled
    masks = kept_images(len(features), REPLICATES, generator)
    distances = kernel_distances(features, reference, torch.cat([torch.ones_like(masks[:1]), masks]))
    return with_interval(distances[0].item(), distances[1:], len(features))


METRIC = Metric(name="kid_fp", position=10, label="KID to FP", better="lower", digits=4, compute=compute)
