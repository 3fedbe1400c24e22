"""AutoRound (Cheng et al., EMNLP findings 2024, arXiv 2309.05516).

Each weight gets an offset of at most half a code before it is rounded, and each end of a weight range a factor of at
most 1. Both are learned block by block with signed gradient descent: a step moves by the learning rate, whatever the
size of the gradient, so that 200 steps, of 1/200 at first and falling to 0, reach every offset. What had the smallest
loss is kept.

Where the paper and this row differ: the paper quantises the weights of language models. Here rows of the denoising
trajectory take the place of token sequences. The layers of the time embedding are learned one by one, and each
projection of it with its residual block, as in `prev`. Activations get one running range each, also as in `prev`.
"""

from __future__ import annotations

from dataclasses import dataclass

from baselines import Method, Settings, applies_always
from tfmq.network.calibration import Spaced
from tfmq.passes import Recipe
from tfmq.passes.activation_ranges import ActivationRanges
from tfmq.passes.signed_rounding import SignedRounding, SignedRoundingConfig


@dataclass(frozen=True)
class Config(Settings):
    """Settings; the defaults are the paper's, and of activation ranges those of TFMQ-DM's base.

    Attributes:
        steps, images: uniformly spaced steps of the pool, and images at each, for learning.
        range_images: images at every step of the schedule for activation ranges.
        iterations, batch: of learning each block.
        learning_rate: of the first step; None for 1 / iterations.
        momentum: of the running activation ranges, over batches of ``range_batch`` shuffled rows.
        memory_gib: as in `_brecq.Config`.
    """

    steps: int = 20
    images: int = 256
    range_images: int = 256
    iterations: int = 200
    batch: int = 8
    learning_rate: float | None = None
    momentum: float = 0.95
    range_batch: int = 16
    memory_gib: float = 64.0

    def recipe(self) -> Recipe:
        """See `Settings`."""
        learning = SignedRoundingConfig(self.iterations, self.batch, self.learning_rate)
        ranges = Spaced(None, self.range_images, shuffled=True)
        return (
            SignedRounding(learning, Spaced(self.steps, self.images), memory_bytes=int(self.memory_gib * 2**30)),
            ActivationRanges(ranges, "minmax", self.momentum, self.range_batch),
        )


METHOD = Method("AutoRound", "arXiv 2309.05516", Config, applies_always)
