"""How well images match the prompts that they were made from, by a CLIP that had no part in making them."""

from torch import Tensor

from benchmarks.metrics import Evidence, Metric
from benchmarks.metrics._interval import mean_of


def per_image(evidence: Evidence) -> Tensor | None:
    """100 x the cosine of each image and its prompt, not cut off at 0; None where the task names no CLIP."""
    return None if evidence.clip_cosines is None else 100 * evidence.clip_cosines[0].double()


METRIC = Metric(
    name="clip_score",
    position=85,
    label="CLIP score ({clips[0]})",
    better="higher",
    digits=2,
    compute=mean_of(per_image),
    per_image=per_image,
)
