"""Q-Diffusion with an activation range for each step at every layer, as in TFMQ-DM's released code.

Step sizes are not learned, since tables are calibrated instead, and they are calibrated as in that code: the running
average over batches of 16 rows of a step. Beside `tfmq_per_step`, with the same tables, it separates what these give
from what the temporal treatment gives.
"""

from __future__ import annotations

from dataclasses import dataclass

from baselines import Method, _brecq, applies_always


@dataclass(frozen=True)
class Config(_brecq.Config):
    """See `_brecq.Config`."""

    split_shortcuts: bool = True
    activation_scales: _brecq.ActivationScales = "per_step"


METHOD = Method("Q-Diffusion, scales per step", "arXiv 2302.04304", Config, applies_always)
