"""The share of images that look like the data: precision; `_manifold` has the definition."""

from torch import Tensor

from benchmarks.metrics import Evidence, Metric
from benchmarks.metrics._interval import mean_of
from benchmarks.metrics._manifold import inside


def per_image(evidence: Evidence) -> Tensor | None:
    """One for each image among the data's, zero for the others; None where the data's features are not known."""
    data, radii = evidence.references.data_pooled, evidence.references.data_radii
    return None if data is None else inside(evidence.features.pooled, data, radii)


METRIC = Metric(
    name="precision_data",
    position=72,
    label="Precision{count}",
    better="higher",
    digits=3,
    compute=mean_of(per_image),
    per_image=per_image,
)
