"""Error of the predicted noise along the sampling trajectory."""

from torch import Tensor

from benchmarks.metrics import Evidence, Metric
from benchmarks.metrics._interval import mean_of


def per_image(evidence: Evidence) -> Tensor | None:
    """Relative L2 error of the predicted noise, mean over steps; None where not measured."""
    return None if evidence.trajectory_error is None else evidence.trajectory_error.double().mean(dim=1)


METRIC = Metric(
    name="noise_error",
    position=90,
    label="Noise error",
    better="lower",
    digits=4,
    compute=mean_of(per_image),
    per_image=per_image,
    paired=True,
)
