"""Low-rank branch with smoothing, in the manner of SVDQuant (Li et al., ICLR 2025, arXiv 2411.05007).

Each input channel is divided by a smoothing factor, which moves outliers from activations to weights. A branch of low
rank in 16 bits, from the singular value decomposition of the smoothed weight, takes them over with the largest part of
the weight. Only the residual is quantised, in groups of input channels, and only its input, at run time. The migration
strength of the smoothing is searched for each layer by the error of its output.

Where the paper and this differ:

- The paper quantises the linear layers of diffusion transformers; this, all layers of a network. The kernel of a
  convolution counts as the matrix (outputs, inputs x kernel positions), and its branch is a convolution to so many
  channels, followed by one of a single pixel. A layer no larger than the rank has no branch and no smoothing.
- Ranges are affine and rounding is to nearest; the paper's are symmetric and its residual may be rounded by GPTQ.
- The input has one range a token (linear, 1x1 convolution) or image (3x3 convolution); the paper's, at 4 bits, one for
  each token and group of 64 channels.
- Attention operands are quantised as the protocol says, dynamically; the paper leaves them in 16 bits.
- Every layer divides by factors of its own when it runs; the paper folds them into the layer before, where they are
  shared among query, key and value. No smoothing is a candidate of the search.
- The paper's layers are thousands of channels wide and a rank of 32 is a few percent of their weights; on layers of a
  hundred channels it is a good part of the checkpoint, so that its size must be read with its error.
"""

from __future__ import annotations

from dataclasses import dataclass

from baselines import Method, Settings, applies_always
from tfmq.network.calibration import Spaced
from tfmq.passes import Recipe
from tfmq.passes.grids import Grids
from tfmq.passes.low_rank import LowRankBranches
from tfmq.passes.weight_ranges import RoundToNearest, WeightRanges


@dataclass(frozen=True)
class Config(Settings):
    """Settings; rank and group are the paper's at 4 bits.

    Attributes:
        rank: of the branch.
        group: input channels that share a weight range in each output channel.
        steps, images: uniformly spaced steps of the pool, and images at each, for the largest input of every channel.
        candidates: migration strengths that are tried, evenly between 0 and 1; a single one is 0.5.
        search_rows: calibration rows on which they are compared.
    """

    rank: int = 32
    group: int = 64
    steps: int = 20
    images: int = 64
    candidates: int = 20
    search_rows: int = 64

    def recipe(self) -> Recipe:
        """See `Settings`."""
        grids = Grids(weight_group=self.group, dynamic_activations=True)
        rows = Spaced(self.steps, self.images)
        branches = LowRankBranches(self.rank, self.candidates, self.search_rows, "minmax", rows)
        return grids, branches, WeightRanges("minmax"), RoundToNearest()


METHOD = Method("SVDQuant", "arXiv 2411.05007", Config, applies_always, executable=False)
