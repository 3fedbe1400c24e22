"""Group-wise weights with per-token dynamic activations: the plain strong baseline of the diffusion-transformer papers.

Every weight goes to the nearest code of the min-max range of its output channel and group of input channels;
activations take their min-max range at run time. Nothing is learned and nothing is calibrated, so nothing is tied to a
schedule of time steps either. Q-DiT (Chen et al., arXiv 2406.17343) has groups of 128 in both, ViDiT-Q (Zhao et al.,
arXiv 2406.02540) a range for each token.

Where the papers and this differ, since theirs is a transformer and this a network with convolutions:

- A group is so many input channels with all their kernel positions: nine times as many weights share a range in a 3x3
  convolution. Where the channels are no multiple of the group, the last group is smaller.
- A token is a row of a linear layer's input, and a pixel of a 1x1 convolution's. A larger kernel adds up pixels, which
  one integer product allows with one range only: there it is the image's.
- Query, key and value have a range for each token and head, attention probabilities one for each row, starting at 0.
- Neither Q-DiT's search of group sizes, nor ViDiT-Q's channel balancing and mixed precision is part of this row.

What a static range does not cost: two reductions over every activation when sampling.
"""

from __future__ import annotations

from dataclasses import dataclass

from baselines import Method, Settings, applies_always
from tfmq.passes import Recipe
from tfmq.passes.grids import Grids
from tfmq.passes.weight_ranges import RoundToNearest, WeightRanges


@dataclass(frozen=True)
class Config(Settings):
    """Settings; the default is Q-DiT's.

    Attributes:
        group: input channels that share a weight range in each output channel.
    """

    group: int = 128

    def recipe(self) -> Recipe:
        """See `Settings`."""
        grids = Grids(weight_group=self.group, dynamic_activations=True)
        return grids, WeightRanges("minmax"), RoundToNearest()


METHOD = Method("Group-wise, dynamic", "arXiv 2406.17343", Config, applies_always, executable=False)
