"""Kernel distance to the data set (Binkowski et al., 2018, arXiv:1801.01401) as torch-fidelity computes it: KID.

The mean over 100 subsets of at most 1,000 images each, drawn by torch-fidelity's own seed, so that the number is the
one that its `calculate_metrics` gives for these features. `kid_fp` has the definition, and uses all images.
"""

import torch
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

from benchmarks.metrics import Evidence, Metric, Value

SUBSETS = 100
SUBSET = 1000


def compute(evidence: Evidence, generator: torch.Generator) -> Value | None:
    """Kernel distance of the pooled features to those of the data's images; None where these are not known.

    Subsets have at most half of the images: with m of N images, the full sample's variance is estimated as m / (N - m)
    times that of the subsets, as in `with_interval`, to which their mean adds a hundredth. Subsets draw from the data
    too, and so the interval is rather too wide.
    """
    features, data = evidence.features.pooled, evidence.references.data_pooled
    if data is None:
        return None
    size = max(2, min(SUBSET, len(features) // 2, len(data)))
    found = kid_features_to_metric(
        features.double(), data.double(), kid_subsets=SUBSETS, kid_subset_size=size, verbose=False
    )
    variance = found[KEY_METRIC_KID_STD] ** 2 * (size / (len(features) - size) + 1 / SUBSETS)
    value, margin = found[KEY_METRIC_KID_MEAN], 1.96 * variance**0.5
    return Value(value=value, low=value - margin, high=value + margin, n=len(features))


METRIC = Metric(name="kid_data", position=68, label="KID to data", better="lower", digits=4, compute=compute)
