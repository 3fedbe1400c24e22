"""Temporal Feature Matters with its choice at each step of each projection, the finest there is.

All projections keep their layer unless the cache wins at every step, so the checkpoint shrinks less than with a choice
for each projection (row `temporal_feature_matters`); its temporal-feature error is the smallest of the three.
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
    caching: Caching | None = "step"


METHOD = Method("Selection per step", "arXiv 2407.19547", Config, applies_always)
