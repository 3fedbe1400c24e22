"""Finite-set calibration alone: TFMQ-DM without its reconstruction of the temporal information block.

Time-embedding layers are reconstructed one by one and each projection with its residual block, as in the base; the
activations of these layers get a min-max range for each step. At w4a32 it is the base itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from baselines import Method, _brecq, applies_always


@dataclass(frozen=True)
class Config(_brecq.Config):
    """See `_brecq.Config`."""

    activation_scales: _brecq.ActivationScales = "temporal"


METHOD = Method("FSC alone", "arXiv 2311.16503", Config, applies_always)
