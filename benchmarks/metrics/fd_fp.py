"""Frechet distance to samples of the full-precision model from other noise."""

import torch

from benchmarks.metrics import Evidence, Metric, Value
from benchmarks.metrics._frechet import frechet_with_interval


def compute(evidence: Evidence, generator: torch.Generator) -> Value | None:
    """Frechet distance of the pooled features to those of the full-precision reference samples; None without any."""
    reference = evidence.references.samples_statistics
    return None if reference is None else frechet_with_interval(evidence.features.pooled, reference.pooled, generator)


METRIC = Metric(name="fd_fp", position=20, label="{distance}{count} to FP", better="lower", digits=2, compute=compute)
