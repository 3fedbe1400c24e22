"""How far each image's features moved from those of the full-precision image of the same noise."""

import torch
from torch.nn import functional

from benchmarks.metrics import Evidence, Metric, Value
from benchmarks.metrics._interval import mean_with_interval


def compute(evidence: Evidence, generator: torch.Generator) -> Value | None:
    """1 - cosine of paired pooled features, mean over images; None for full precision."""
    if evidence.paired_features is None:
        return None
    similarity = functional.cosine_similarity(
        evidence.features.pooled.double(), evidence.paired_features.pooled.double(), dim=1
    )
    return mean_with_interval((1 - similarity).clamp(min=0), generator)


METRIC = Metric(
    name="feature_distance", position=30, label="Feature distance", better="lower", digits=4, compute=compute
)
