"""A bound on every temporal method: the base with the layers of the time step alone left in full precision.

Time-embedding network and projections are not quantised at all, so the temporal features are exact. No row of the
leaderboard may do this; what it gains over `prev` is the most that keeping temporal features can gain.
"""

from __future__ import annotations

from dataclasses import dataclass

from baselines import Method, _brecq, applies_always


@dataclass(frozen=True)
class Config(_brecq.Config):
    """See `_brecq.Config`."""

    temporal: _brecq.Temporal = "full_precision"


METHOD = Method("Base, temporal layers exact", "arXiv 2311.16503", Config, applies_always)
