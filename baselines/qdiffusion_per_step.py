"""Q-Diffusion with an activation range for each step at every layer, as in TFMQ-DM's released code.

Step sizes are not learned, since tables are calibrated instead. Beside `tfmq_per_step` it separates what the tables
give from what the temporal treatment gives.
"""

from __future__ import annotations

from dataclasses import dataclass

from baselines import Method, _brecq, applies_always
from tfmq.quantization import ActivationScales


@dataclass(frozen=True)
class Config(_brecq.Config):
    """See `_brecq.Config`."""

    range_steps: int | None = None
    range_batch: int = 64
    split_shortcuts: bool = True
    activation_scales: ActivationScales = "per_step"


METHOD = Method("Q-Diffusion, scales per step", "arXiv 2302.04304", Config, _brecq.quantize, applies_always)
