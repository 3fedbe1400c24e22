"""The block-wise base with TCAQ-DM's third part alone: it is reconstructed again on its own trajectories.

Compared with `prev` it says what these rounds gain (PAR; `tcaq_dm` says how they are done here). Activations are
quantised in them, and their step sizes learn, which is a part of the gain. Grids are those of the base, which integer
kernels execute.
"""

from __future__ import annotations

from dataclasses import dataclass

from baselines import Method, _tcaq, applies_always


@dataclass(frozen=True)
class Config(_tcaq.Config):
    """See `_tcaq.Config`."""

    rounds: int = 3


METHOD = Method("Base + recalibration (PAR)", "arXiv 2412.16700", Config, applies_always)
