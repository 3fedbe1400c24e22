"""The block-wise base with TCAQ-DM's first part alone: factors even out the input channels of convolutions.

Compared with `prev` it says what the reparameterisation gains (TCR; `tcaq_dm` says how it is done here).
"""

from __future__ import annotations

from dataclasses import dataclass

from baselines import Method, _tcaq, applies_always


@dataclass(frozen=True)
class Config(_tcaq.Config):
    """See `_tcaq.Config`."""

    scales_channels: bool = True


METHOD = Method("Base + channel scales (TCR)", "arXiv 2412.16700", Config, applies_always, executable=False)
