"""Q-Diffusion with finite-set calibration: its layers of the time step alone get an activation range for each step.

All else is Q-Diffusion: these layers are reconstructed one by one or with their block, all other step sizes are
learned. Tables are not: they are exact min-max ranges of one known vector each.
"""

from __future__ import annotations

from dataclasses import dataclass

from baselines import Method, _brecq, applies_always


@dataclass(frozen=True)
class Config(_brecq.Config):
    """See `_brecq.Config`."""

    range_steps: int | None = None
    range_batch: int = 64
    split_shortcuts: bool = True
    activation_scales: _brecq.ActivationScales = "temporal"
    activation_iterations: int = 5_000


METHOD = Method("Q-Diffusion, temporal scales", "arXiv 2302.04304", Config, applies_always)
