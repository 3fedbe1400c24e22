"""Temporal Feature Matters (Huang et al., TPAMI 2025, arXiv 2407.19547), the successor of TFMQ-DM.

Two ways to keep the temporal features: the temporal information block of TFMQ-DM, quantised and reconstructed; or a
cache: the features of every step computed ahead in full precision, quantised with a range for each step, and looked up.
Disturbance-aware selection takes for each projection the one with the smaller temporal-feature error (1 - cosine, mean
over steps). Where all projections are looked up, time-embedding network and projections are dropped.

No code is released and the selection's formula is not in what we could read, so the following are our reading:

- The unit of choice is the projection (only then can its layer be dropped); the row `selection_per_step` chooses at
  each step of each projection, the row `cache` always takes the cache.
- Codes of the cache have the activation bits; at 32 activation bits it holds the features themselves.
- The error is that of TFMQ-DM's figures. Selection comes last, after blocks are reconstructed and ranges calibrated.
"""

from __future__ import annotations

from dataclasses import dataclass

from baselines import Method, _brecq, applies_always
from tfmq.passes.temporal_cache import Caching


@dataclass(frozen=True)
class Config(_brecq.Config):
    """See `_brecq.Config`."""

    temporal: _brecq.Temporal = "joint"
    activation_scales: _brecq.ActivationScales = "temporal"
    caching: Caching | None = "projection"


METHOD = Method("Temporal Feature Matters", "arXiv 2407.19547", Config, applies_always)
