"""The block-wise base with TCAQ-DM's second part alone: logarithmic grids where probabilities follow a power law.

Compared with `prev` it says what the choice of grids gains (DAQ; `tcaq_dm` says how it is made here). Probabilities
have a range for each time step then, uniform or not, which `prev` does not give them.
"""

from __future__ import annotations

from dataclasses import dataclass

from baselines import Method, _tcaq, applies_always


@dataclass(frozen=True)
class Config(_tcaq.Config):
    """See `_tcaq.Config`."""

    adapts_probabilities: bool = True


METHOD = Method("Base + adaptive probabilities (DAQ)", "arXiv 2412.16700", Config, applies_always, executable=False)
