"""Temporal-information-aware reconstruction alone: TFMQ-DM without its finite-set calibration.

The temporal information block is reconstructed jointly on the finite set of steps; every activation, those of the block
too, keeps one range for all steps. At w4a32 it is TFMQ-DM itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from baselines import Method, _brecq, applies_always


@dataclass(frozen=True)
class Config(_brecq.Config):
    """See `_brecq.Config`."""

    temporal: _brecq.Temporal = "joint"


METHOD = Method("TIAR alone", "arXiv 2311.16503", Config, applies_always)
