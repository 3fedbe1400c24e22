"""Error of the predicted noise along the sampling trajectory."""

import torch

from benchmarks.metrics import Evidence, Metric, Value
from benchmarks.metrics._interval import mean_with_interval


def compute(evidence: Evidence, generator: torch.Generator) -> Value | None:
    """Relative L2 error of the predicted noise, mean over steps and images; None where not measured."""
    if evidence.trajectory_error is None:
        return None
    return mean_with_interval(evidence.trajectory_error.double().mean(dim=1), generator)


METRIC = Metric(name="noise_error", position=90, label="Noise error", better="lower", digits=4, compute=compute)
