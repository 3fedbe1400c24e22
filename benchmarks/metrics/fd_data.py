"""Frechet distance to the data set: FID where the evaluator is the FID Inception network."""

import torch

from benchmarks.metrics import Evidence, Metric, Value
from benchmarks.metrics._frechet import frechet_with_interval


def compute(evidence: Evidence, generator: torch.Generator) -> Value:
    """Frechet distance of the pooled features to those of the data set."""
    return frechet_with_interval(evidence.features.pooled, evidence.references.data_statistics.pooled, generator)


METRIC = Metric(
    name="fd_data", position=60, label="{distance}{count} to data", better="lower", digits=2, compute=compute
)
