"""The CLIP score by the second CLIP that a task names: scores of different CLIPs are not comparable."""

from torch import Tensor

from benchmarks.metrics import Evidence, Metric
from benchmarks.metrics._interval import mean_of


def per_image(evidence: Evidence) -> Tensor | None:
    """100 x the cosine of each image and its prompt, not cut off at 0; None where the task names no second CLIP."""
    if evidence.clip_cosines is None or len(evidence.clip_cosines) < 2:
        return None
    return 100 * evidence.clip_cosines[1].double()


METRIC = Metric(
    name="clip_score_second",
    position=86,
    label="CLIP score ({clips[1]})",
    better="higher",
    digits=2,
    compute=mean_of(per_image),
    per_image=per_image,
)
