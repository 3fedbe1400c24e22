"""TCAQ-DM: timestep-channel adaptive quantisation (Huang et al., AAAI 2025, arXiv 2412.16700).

Three parts are added to a block-wise reconstruction (AdaRound within BRECQ, the row `prev`). Channels of the inputs of
convolutions are divided by factors, which the weights take over; the factors even out ranges jointly for all time
steps (timestep-channel joint reparameterisation). Attention probabilities get a logarithmic grid at the steps where
they follow a power law, by a likelihood-ratio test, else a uniform one (dynamically adaptive quantiser). Then the
calibration trajectories are sampled again, with the quantised network, and it is reconstructed on these, in several
shorter rounds (progressively aligned reconstruction).

No code is released, and what is here of the paper's formulas comes from descriptions of it. Where these are silent:

- A channel's factor in a group of steps is its range there; the joint one is their mean weighted by these ranges, no
  more than 10 times the mean of all channels or less than a tenth of it. With a strength below 1 it is SmoothQuant's
  factor instead, which looks at the weight too.
- A power law on the range that the values span is tested against a uniform distribution there and a normal one, each at
  its maximum-likelihood parameters, by Vuong's test; it has to beat both.
- The logarithmic grid is of base 2 and begins at the largest value seen at the step.
- In each round roundings start between the weight and its code of before, with all activations quantised, and step
  sizes of activations are learned, too. Inputs are those of the quantised network, targets those of full precision from
  the same latents. How often and how long: three rounds, of a quarter of the iterations.
- Factors are not folded into the layer before, where a norm and an activation function stand between. The division is
  done in floating point, so that integer kernels do not execute these layers as they are; nor logarithmic codes.
"""

from __future__ import annotations

from dataclasses import dataclass

from baselines import Method, _tcaq, applies_always


@dataclass(frozen=True)
class Config(_tcaq.Config):
    """See `_tcaq.Config`."""

    scales_channels: bool = True
    adapts_probabilities: bool = True
    rounds: int = 3


METHOD = Method("TCAQ-DM", "arXiv 2412.16700", Config, applies_always, executable=False)
