"""The switch of DyQ-VLA (arXiv 2603.07904), a method for robots, transferred to denoising on top of TFMQ-DM.

This is no method of diffusion models: nobody has published it for these, and the row says what becomes of an idea from
another field. DyQ-VLA quantises a vision-language-action model that moves an arm, and chooses the bits of its
activations online from the arm's motion: coarse motion bears few, fine and abrupt motion needs many, with hysteresis
and a lookup table. `tfmq.passes.speed_bits` puts the latents in the place of the arm.

What is transferred, and how:

- Motion fineness becomes the relative distance that the latents go in a step, angular jerk the change of that. The
  weight of the two is ours.
- Widths are 2 bits below the precision's, its own, and 2 above; the original has 2, 4, 8 and 16. Thresholds are placed
  so that the mean over the schedule is the precision's or less; a cell's record has it (``average_activation_bits``).
- The original decides online. Here the schedule decides almost alone how fast latents move, and the pool tells it
  before.
- Where latents move fast, activations get fewer bits, as the original has it. Whether diffusion agrees is what the row
  shows: ``fast: more`` turns it round.
- Weights, their roundings and the ranges of activations are TFMQ-DM's. A range stays and is cut in more or fewer parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from baselines import Method, _brecq
from tfmq.passes import Recipe
from tfmq.passes.speed_bits import FEWEST, SpeedBits
from tfmq.precision import FULL, Precision


@dataclass(frozen=True)
class Config(_brecq.Config):
    """See `_brecq.Config`, with TFMQ-DM's defaults, and `tfmq.passes.speed_bits.SpeedBits`."""

    temporal: _brecq.Temporal = "joint"
    activation_scales: _brecq.ActivationScales = "temporal"
    offsets: tuple[int, ...] = (-2, 0, 2)
    change_weight: float = 0.25
    margin: float = 0.05
    fast: Literal["fewer", "more"] = "fewer"

    def __post_init__(self) -> None:
        """Raises ValueError for looked-up features, which have one width."""
        super().__post_init__()
        if self.caching is not None:
            raise ValueError(f"caching is {self.caching!r}: looked-up features have one width; leave it out")

    def recipe(self) -> Recipe:
        """See `Settings`."""
        return *super().recipe(), SpeedBits(self.offsets, self.change_weight, self.margin, self.fast)


def objection(precision: Precision) -> str:
    """Switching needs activations, and a width below theirs."""
    if precision.activation_bits == FULL:
        return "it chooses widths of activations, and this precision leaves these in full precision"
    if precision.activation_bits < FEWEST + 2:
        return f"it also takes 2 bits less than the precision's, and a width has {FEWEST} at least"
    return ""


METHOD = Method("Speed switch (from DyQ-VLA)", "arXiv 2603.07904 (robotics)", Config, objection, executable=False)
