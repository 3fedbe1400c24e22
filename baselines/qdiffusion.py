"""Q-Diffusion (Li et al., ICCV 2023, arXiv 2302.04304).

Calibrates on uniformly spaced time steps, learns roundings block by block (AdaRound within BRECQ), gives the two halves
of concatenated shortcuts ranges of their own, and learns activation step sizes. One activation scale serves all time
steps; the time-embedding layers are reconstructed one by one like any other layer, the projections with their block.

Where the released code and the paper differ, and what is done here:

- Splits: the paper presents them for every model, the LDM script has no flag for them; here they are always on.
- Activation ranges: the released recipes initialise on pure-noise inputs or on the noisiest steps first, so that a
  running average forgets the noisy ones; here rows are shuffled, as in its Stable Diffusion recipe.
- Softmax: unsigned with zero point 0, at 8 bits in the code (protocol `as_run`); else at the activation bits.
- First and last layer take the target bits in the code (protocol `published`), 8 bits under protocol `shared`.
- The rounding regulariser skips the second half of a split layer in the code; here both halves count.
- Reconstruction crashes on parts without parameters (its repository's issue 26); here these have nothing to learn.
- Gathering data leaves the network in training mode, with dropout, in the code; here it is never in that mode.
"""

from __future__ import annotations

from dataclasses import dataclass

from baselines import Method, _brecq, needs_8_bit_activations
from tfmq.plan import Protocol


@dataclass(frozen=True)
class Config(_brecq.Config):
    """See `_brecq.Config`; the defaults are those of the released LSUN recipe (20 x 256 = 5,120 rows)."""

    range_steps: int | None = 20
    range_batch: int = 64
    split_shortcuts: bool = True
    activation_iterations: int = 5_000


PUBLISHED = Protocol("published", {})
AS_RUN = Protocol("as_run", {}, softmax_bits=8)
METHOD = Method("Q-Diffusion", "arXiv 2302.04304", Config, needs_8_bit_activations, PUBLISHED, AS_RUN)
