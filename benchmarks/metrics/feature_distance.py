"""How far each image's features moved from those of the full-precision image of the same noise."""

from torch import Tensor
from torch.nn import functional

from benchmarks.metrics import Evidence, Metric
from benchmarks.metrics._interval import mean_of


def per_image(evidence: Evidence) -> Tensor | None:
    """1 - cosine of paired pooled features; None for full precision."""
    if evidence.paired_features is None:
        return None
    similarity = functional.cosine_similarity(
        evidence.features.pooled.double(), evidence.paired_features.pooled.double(), dim=1
    )
    return (1 - similarity).clamp(min=0)


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
