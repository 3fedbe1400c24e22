"""SQ-DM: 4-bit blocks with scales of 8 bits, and ReLU for sparse activations (Fan et al., DAC 2025, arXiv 2501.15448).

SiLU becomes ReLU, and the network is tuned to bear it: activations are then not negative, so that their codes need no
sign, and many are 0. The first and the last block have 8 bits in MXINT8, where 32 values share a power of two. Weights
and activations between have 4 bits and an E4M3 scale for each block of values, that of activations computed at run
time. The paper's accelerator labels each channel at each time step as sparse or dense, at a threshold of 30 %, and
skips what is 0 in sparse ones. That is hardware; here the zeros are counted, and the multiplications that would be
skipped: numbers in the details of each cell's record (`tfmq.passes.sparsity.MeasureSparsity`). Nothing is executed in
these formats.

Only the paper's abstract and second-hand summaries could be read, not its tables and settings. What it may say
otherwise, and what is done here:

- It is about EDM and EDM2. "Block" is read as residual block, besides the first and the last convolution; where the
  last residual block is followed by an attention module, that is the last block.
- A block of values is so many consecutive input channels, at one kernel position of a weight and one pixel of an input.
  E4M3 scales are shared by 16 (NVFP4's and VS-Quant's number). They span 2^-9 to 448, so that a coarse scale in float32
  goes with them: for each output channel of a weight, and each image of an input.
- Scales are those of the largest value, and rounding is to nearest.
- ReLU comes at once, in residual blocks, with what they take of the time step, and before the last convolution. The
  time-embedding network keeps SiLU. A diffusion transformer has none over pixels: it keeps its activation functions, is
  not tuned, and has no sparsity to count.
- Tuning compares predictions with those of the network as it was given, on the calibration pool, in full precision and
  before anything is quantised. The paper's data, loss and number of steps are not known; ours are few.
- Attention products, and all layers that the protocol names, are quantised: operands of attention have a dynamic range
  for each token and head. The paper's treatment of them is not known.
- A channel is sparse at a step where 30 % of its values, or more, are 0 over the images of the pool. Padding is not
  counted, and skipping costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from baselines import Method, Settings
from tfmq.network.calibration import Spaced
from tfmq.passes import Recipe
from tfmq.passes.block_formats import BlockFormats
from tfmq.passes.rectification import Rectification
from tfmq.passes.sparsity import MeasureSparsity
from tfmq.passes.weight_ranges import RoundToNearest, WeightRanges
from tfmq.precision import Precision

BITS = 4


@dataclass(frozen=True)
class Config(Settings):
    """Settings; but for the threshold, the paper's are not known.

    Attributes:
        block: channels that share an E4M3 scale.
        wide_block: channels that share a power of two, in MXINT8.
        wide_ends: blocks of the network in MXINT8 at each end, besides the first and the last layer.
        iterations, batch, learning_rate: of tuning with ReLU.
        steps, images: uniformly spaced steps of the pool, and images at each, that it is tuned on.
        threshold: share of zeros from which on a channel is sparse.
        sparsity_images: images of the pool on which zeros are counted, at every step.
    """

    block: int = 16
    wide_block: int = 32
    wide_ends: int = 1
    iterations: int = 1000
    batch: int = 16
    learning_rate: float = 5e-4
    steps: int = 20
    images: int = 128
    threshold: float = 0.3
    sparsity_images: int = 16

    def recipe(self) -> Recipe:
        """See `Settings`."""
        return (
            Rectification(self.iterations, self.batch, self.learning_rate, Spaced(self.steps, self.images)),
            BlockFormats(self.block, self.wide_block, self.wide_ends),
            WeightRanges("minmax"),
            RoundToNearest(),
            MeasureSparsity(self.threshold, Spaced(None, self.sparsity_images)),
        )


def objection(precision: Precision) -> str:
    """The paper's formats have 4 bits for both."""
    if (precision.weight_bits, precision.activation_bits) == (BITS, BITS):
        return ""
    return f"its formats have {BITS} bits for weights and activations, and 8 in the first and the last block"


METHOD = Method("SQ-DM", "arXiv 2501.15448", Config, objection, executable=False)
