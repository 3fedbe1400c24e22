"""GPTQ: rounding weights by second moments of their inputs (Frantar et al., ICLR 2023, arXiv 2210.17323).

The columns of a weight are rounded one after the other, and those that are left make up for the mistake of each, by the
second moments of the layer's inputs in the network quantised so far. Nothing is learned. The paper quantises language
models; this row does the same to a denoising network, with the activation ranges of the block-wise base (`prev`).

Where the paper, its released code and this row differ:

- The paper takes 128 samples of 2,048 tokens of text. Here a sample is an image at each of some time steps, and each
  layer sees it at all pixels.
- The paper rounds columns in their order; here those of the largest second moment come first, which is an option of the
  released code (``act_order``) and that of GPTQ's later implementations.
- The released code rounds the layers of a block by what they see before any of them is rounded, or, as an option
  (``true_sequential``), one group of layers after the other. Here it is one layer after the other.
- The paper rounds weights alone. Here activations get ranges afterwards.
- Columns are rounded by the factor of the second moments and not of their inverse, which gives the same codes
  (`tfmq.numerics.second_order`).
"""

from __future__ import annotations

from dataclasses import dataclass

from baselines import Method, Settings, applies_always
from tfmq.network.calibration import Spaced
from tfmq.passes import Recipe
from tfmq.passes.activation_ranges import ActivationRanges
from tfmq.passes.second_order_rounding import SecondOrderRounding


@dataclass(frozen=True)
class Config(Settings):
    """Settings; the defaults are the paper's where it has them.

    Attributes:
        steps, images: uniformly spaced steps of the pool, and images at each, that second moments are taken from.
        range_steps, range_images: the same for activation ranges; None takes every step of the schedule.
        damping: added to the diagonal of the second moments, as a share of its mean.
        momentum: of the running activation ranges, over batches of ``range_batch`` shuffled rows.
        memory_gib: as in `prev`.
    """

    steps: int = 20
    images: int = 128
    range_steps: int | None = None
    range_images: int = 256
    damping: float = 0.01
    momentum: float = 0.95
    range_batch: int = 16
    memory_gib: float = 64.0

    def recipe(self) -> Recipe:
        """See `Settings`."""
        rows, ranges = Spaced(self.steps, self.images), Spaced(self.range_steps, self.range_images, shuffled=True)
        return (
            SecondOrderRounding(
                share=0.0,
                damping=self.damping,
                range="minmax",
                sweeps=0,
                biases=False,
                data=rows,
                memory_bytes=int(self.memory_gib * 2**30),
            ),
            ActivationRanges(ranges, momentum=self.momentum, batch=self.range_batch),
        )


METHOD = Method("GPTQ", "arXiv 2210.17323", Config, applies_always)
