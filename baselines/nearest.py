"""Round-to-nearest: every weight to the nearest code of its channel's min-max range; nothing is learned.

Activation ranges are the widest min-max range over the calibration rows, one scale a tensor for all time steps. This is
the plain baseline that any method has to beat.
"""

from __future__ import annotations

from dataclasses import dataclass

from baselines import Method, Settings, applies_always
from tfmq.network.calibration import Spaced
from tfmq.passes import Recipe
from tfmq.passes.activation_ranges import ActivationRanges
from tfmq.passes.weight_ranges import RoundToNearest, WeightRanges


@dataclass(frozen=True)
class Config(Settings):
    """Settings of the activation ranges.

    Attributes:
        steps, images: uniformly spaced steps of the pool, and images at each, that ranges are taken from.
        batch: rows evaluated at once.
    """

    steps: int = 20
    images: int = 64
    batch: int = 64

    def recipe(self) -> Recipe:
        """See `Settings`."""
        ranges = ActivationRanges(Spaced(self.steps, self.images), batch=self.batch)
        return WeightRanges("minmax"), RoundToNearest(), ranges


METHOD = Method("Round-to-nearest", "plain baseline", Config, applies_always)
