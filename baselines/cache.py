"""The cache of Temporal Feature Matters alone: every temporal feature is looked up, none is computed.

Time-embedding network and projections are gone before anything is quantised, so blocks are reconstructed around the
cached features. It optimises nothing for the time step, and its checkpoint is the smallest.
"""

from __future__ import annotations

from dataclasses import dataclass

from baselines import Method, _brecq, applies_always
from tfmq.passes.temporal_cache import Caching


@dataclass(frozen=True)
class Config(_brecq.Config):
    """See `_brecq.Config`."""

    caching: Caching | None = "all"


METHOD = Method("Cache alone", "arXiv 2407.19547", Config, applies_always)
