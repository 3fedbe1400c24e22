"""Perceptual distance of each image from the full-precision image of the same noise.

LPIPS with the evaluator's network and without learned channel weights, so its values are not LPIPS values; see
`benchmarks.features.perceptual_distance`.
"""

import torch

from benchmarks.metrics import Evidence, Metric, Value
from benchmarks.metrics._interval import mean_with_interval


def compute(evidence: Evidence, generator: torch.Generator) -> Value | None:
    """Perceptual distance, mean over images; None for full precision."""
    if evidence.perceptual_distance is None:
        return None
    return mean_with_interval(evidence.perceptual_distance, generator)


METRIC = Metric(name="perceptual", position=40, label="Perceptual distance", better="lower", digits=3, compute=compute)
