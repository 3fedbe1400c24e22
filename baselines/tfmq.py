"""TFMQ-DM: temporal feature maintenance quantisation (Huang et al., CVPR 2024, arXiv 2311.16503).

All layers that depend on the time step alone form the temporal information block. It is reconstructed jointly on the
finite set of sampling steps (temporal-information-aware reconstruction, eq. 8), instead of each projection with its
residual block, and its activations get one min-max range for each step (finite-set calibration). The other layers are
reconstructed block by block (AdaRound within BRECQ); their activations keep one running range for all steps.

Where the released code and the paper differ, and what is done here:

- The code keeps a range for each step at every activation of the network; the paper, at those of the temporal block.
  The paper is followed; the row `tfmq_per_step` follows the code.
- The code leaves input and output layer, first time-embedding layer, shortcuts and downsampling in full precision
  (protocol `published`); protocol `shared` quantises the same layers for every method.
- On LDM's UNet the code quantises nothing of attention, neither layers, which are of a kind that its map of layers
  lacks, nor products, whose flag it never sets; two more inputs stay in full precision too (protocol `as_run`).
- The code samples anew from noise for each step of the calibration set, so that steps have other images; here all
  steps have the same.
- Step sizes of activations are not learned, in either.
"""

from __future__ import annotations

from dataclasses import dataclass

from baselines import Method, _brecq, applies_always
from tfmq.plan import Protocol


@dataclass(frozen=True)
class Config(_brecq.Config):
    """See `_brecq.Config`; the defaults are those of the released LSUN recipe."""

    temporal: _brecq.Temporal = "joint"
    activation_scales: _brecq.ActivationScales = "temporal"


PUBLISHED = Protocol("published", {"boundary": 32, "first_time_layer": 32, "shortcuts": 32, "downsampling": 32})
AS_RUN = Protocol(
    "as_run",
    {**PUBLISHED.bits, "attention_layers": 32, "attention_products": 32},
    inputs={"second_time_layer": 32, "first_block_convolution": 32},
)
METHOD = Method("TFMQ-DM", "arXiv 2311.16503", Config, applies_always, PUBLISHED, AS_RUN)
