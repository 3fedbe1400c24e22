"""The recipe of PTQD: a block-wise base whose prediction is corrected in the sampler."""

from __future__ import annotations

from dataclasses import dataclass, replace

from baselines import _brecq
from tfmq.modules.fake_quantize import ActivationRange
from tfmq.passes import Recipe
from tfmq.passes.correction import MeasureCorrection
from tfmq.plan import Protocol

PUBLISHED = Protocol(
    "published", {"boundary": 8, "first_time_layer": 8, "shortcuts": 32, "downsampling": 32, "attention_products": 32}
)
AS_RUN = replace(PUBLISHED, name="as_run")


@dataclass(frozen=True)
class Config(_brecq.Config):
    """Settings of the base, see `_brecq.Config`, and of the correction; the defaults are those of the released recipe.

    20 steps x 51 images stand for its 1,024 random rows, 16 x 2 for the 32 random rows of its activation ranges.

    Attributes:
        correction_images: images of the pool that the error is measured on at every step.
    """

    images: int = 51
    range_steps: int | None = 16
    range_images: int = 2
    range_batch: int = 32
    iterations: int = 10_000
    batch: int = 8
    activation_range: ActivationRange = "search"
    activation_iterations: int = 5_000
    correction_images: int = 1024

    def recipe(self) -> Recipe:
        """See `Settings`."""
        return *super().recipe(), MeasureCorrection(self.correction_images, self.range_batch)
