"""The "Freeze" experiment of TFMQ-DM's poster: the base, but layers of the time step alone are never reconstructed.

They are rounded to nearest in their min-max ranges, and the blocks are reconstructed around them. If that is better
than `prev`, reconstructing a projection together with its residual block harms it; the poster reports FID 7.08 against
9.36 on LSUN-Bedrooms at w4a8, and 5.76 against 7.51 at w8a8.
"""

from __future__ import annotations

from dataclasses import dataclass

from baselines import Method, _brecq, applies_always


@dataclass(frozen=True)
class Config(_brecq.Config):
    """See `_brecq.Config`."""

    temporal: _brecq.Temporal = "frozen"


METHOD = Method("Base, temporal layers frozen", "arXiv 2311.16503", Config, applies_always)
