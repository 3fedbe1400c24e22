"""What this library recommends: rounding by second moments, a range for each step, and tuning where bits are few.

No paper has this combination (`tfmq.recommended_recipe`). Weights are rounded in closed form against full-precision
outputs (`tfmq.passes.second_order_rounding`), activations get running ranges, and then scales, step sizes, biases,
norms and roundings are tuned by the error of the whole network's prediction (`tfmq.passes.noise_distillation`). These
modules name their papers. `python -m benchmarks study` measures what each part gains, and takes.
"""

from __future__ import annotations

from dataclasses import dataclass

from baselines import Method, Settings, applies_always
from tfmq.passes import Recipe
from tfmq.recommended import recommended_recipe


@dataclass(frozen=True)
class Config(Settings):
    """Settings: see `tfmq.recommended_recipe`; ``memory_gib`` is as in `prev`."""

    later = ("range_margin",)

    rows: int = 640
    range_images: int = 128
    per_step: bool = True
    tuning_iterations: int = 200
    memory_gib: float = 64.0
    range_margin: float = 0.0

    def recipe(self) -> Recipe:
        """See `Settings`."""
        memory = int(self.memory_gib * 2**30)
        return recommended_recipe(
            self.rows,
            self.range_images,
            self.per_step,
            self.tuning_iterations,
            deployable=False,
            memory_bytes=memory,
            range_margin=self.range_margin,
        )


METHOD = Method("Recommended", "this library", Config, applies_always)
