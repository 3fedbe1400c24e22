"""TFMQ-DM as its released code runs it: every activation of the network has a range for each step.

A step's range is the running average over batches of 16 rows of that step, of 256, as released. The paper gives tables
only to the temporal information block (row `tfmq`). Compared with `qdiffusion_per_step`, which has the same tables and
no temporal treatment, it says how much of the code's gain comes from the tables alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from baselines import Method, _brecq, applies_always


@dataclass(frozen=True)
class Config(_brecq.Config):
    """See `_brecq.Config`."""

    temporal: _brecq.Temporal = "joint"
    activation_scales: _brecq.ActivationScales = "per_step"


METHOD = Method("TFMQ-DM, scales per step", "arXiv 2311.16503", Config, applies_always)
