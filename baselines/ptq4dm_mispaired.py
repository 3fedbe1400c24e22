"""PTQ4DM with the calibration set of its released code (arXiv 2211.15736), as an ablation.

The code draws j = int(N(0.4, 0.4) T), clipped to 0 .. T - 1, and keeps what the sampler puts out when its loop
counter is j. The counter runs from the noisiest step, the label j counts from the cleanest: a label near 0 gets
nearly pure noise. The label is then fed to the network as its time step, though the network knows the steps of the
training schedule, up to about 1000. So latents and time steps do not belong together, and ranges come from more noise
than the paper means. All else is as in `ptq4dm`.
"""

from __future__ import annotations

from dataclasses import dataclass

from baselines import Method, _ptq4dm, needs_8_bit_activations
from tfmq.plan import Protocol


@dataclass(frozen=True)
class Config(_ptq4dm.Config):
    """See `_ptq4dm.Config`; the defaults are those of the released script."""

    deviation: float | None = 0.4
    mispaired: bool = True


PUBLISHED = Protocol("published", {"boundary": 8, "attention_layers": 32, "attention_products": 32})
METHOD = Method("PTQ4DM, mispaired", "arXiv 2211.15736, code", Config, needs_8_bit_activations, PUBLISHED)
