"""Frechet distance to the data set on features that keep their positions: sFID where the evaluator is Inception.

It sees spatial structure that pooling averages away (Nash et al., 2021, arXiv:2103.03841).
"""

import torch

from benchmarks.metrics import Evidence, Metric, Value
from benchmarks.metrics._frechet import frechet_with_interval


def compute(evidence: Evidence, generator: torch.Generator) -> Value | None:
    """Frechet distance of the spatial features to those of the data set; None where its statistics have none."""
    reference = evidence.references.data_statistics.spatial
    return None if reference is None else frechet_with_interval(evidence.features.spatial, reference, generator)


METRIC = Metric(
    name="sfd_data", position=70, label="s{distance}{count} to data", better="lower", digits=2, compute=compute
)
