"""Frechet distance to the data set by the task's second evaluator: clean-fid's FID, beside torch-fidelity's.

The two differ in how images are resized alone, by more than quantisation often moves either of them.
"""

import torch

from benchmarks.metrics import Evidence, Metric, Value
from benchmarks.metrics._frechet import frechet_with_interval


def compute(evidence: Evidence, generator: torch.Generator) -> Value | None:
    """Frechet distance of the second evaluator's features to those of the data set; None without such an evaluator."""
    features, reference = evidence.second_features, evidence.references.second_data
    return None if features is None or reference is None else frechet_with_interval(features, reference, generator)


METRIC = Metric(
    name="fd_clean", position=65, label="{second}{count} to data", better="lower", digits=2, compute=compute
)
