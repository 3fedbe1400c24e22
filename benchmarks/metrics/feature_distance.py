"""How far each image's features moved from those of the full-precision image of the same noise."""

from torch import Tensor
from torch.nn import functional

from benchmarks.metrics import Evidence, Metric
from benchmarks.metrics._interval import mean_of


def distances(pooled: Tensor, paired: Tensor) -> Tensor:
    """1 - cosine (N,) of pooled features (N, D) and those that they are paired with."""
    return (1 - functional.cosine_similarity(pooled.double(), paired.double(), dim=1)).clamp(min=0)


def per_image(evidence: Evidence) -> Tensor | None:
    """1 - cosine of paired pooled features; None for full precision."""
    if evidence.paired_features is None:
        return None
    return distances(evidence.features.pooled, evidence.paired_features.pooled)


METRIC = Metric(
    name="feature_distance",
    position=30,
    label="Feature distance",
    better="lower",
    digits=4,
    compute=mean_of(per_image),
    per_image=per_image,
    paired=True,
)
