"""The share of the data that the images look like: recall; `_manifold` has the definition."""

import torch

from benchmarks.metrics import Evidence, Metric, Value
from benchmarks.metrics._interval import mean_with_interval
from benchmarks.metrics._manifold import inside


def compute(evidence: Evidence, generator: torch.Generator) -> Value | None:
    """Recall, a mean over the data's images; None where their features are not known.

    Unlike other intervals, this one is over the data's images, which `n` counts: what other images of the model
    would change is not in it.
    """
    data = evidence.references.data_pooled
    return None if data is None else mean_with_interval(inside(data, evidence.features.pooled), generator)


METRIC = Metric(name="recall_data", position=74, label="Recall{count}", better="higher", digits=3, compute=compute)
