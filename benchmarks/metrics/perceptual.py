"""Perceptual distance of each image from the full-precision image of the same noise.

LPIPS with the evaluator's network and without learned channel weights, so its values are not LPIPS values; see
`benchmarks.features.perceptual_distance`.
"""

from torch import Tensor

from benchmarks.metrics import Evidence, Metric
from benchmarks.metrics._interval import mean_of


def per_image(evidence: Evidence) -> Tensor | None:
    """Perceptual distance; None for full precision."""
    return None if evidence.perceptual_distance is None else evidence.perceptual_distance.double()


METRIC = Metric(
    name="perceptual",
    position=40,
    label="Perceptual distance",
    better="lower",
    digits=3,
    compute=mean_of(per_image),
    per_image=per_image,
    paired=True,
)
