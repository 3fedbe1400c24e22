"""What this library recommends: rounding by second moments, activation ranges, and a short tuning from end to end.

A combination of no paper (`tfmq.recommended_recipe`). Weights are rounded in closed form against full-precision
outputs, as `tfmq.passes.second_order_rounding` does; activations get running ranges; and what the codes leave
continuous is tuned with the whole network running, by the error of its prediction, as
`tfmq.passes.noise_distillation` does. Each part names its papers where it stands. `python -m benchmarks study` measures
what each part gains, and takes.
"""

from __future__ import annotations

from dataclasses import dataclass

from baselines import Method, Settings, applies_always
from tfmq.modules.fake_quantize import ActivationRange
from tfmq.passes import Recipe
from tfmq.recommended import recommended_recipe
from tfmq.settings import check_choices


@dataclass(frozen=True)
class Config(Settings):
    """Settings: see `tfmq.recommended_recipe`; ``memory_gib`` is as in `prev`."""

    rows: int = 640
    range_images: int = 24
    activation_range: ActivationRange = "minmax"
    tuning_iterations: int = 100
    learning_rate: float = 3e-4
    rounding_rate: float = 0.0
    memory_gib: float = 64.0

    def __post_init__(self) -> None:
        check_choices(self)

    def recipe(self) -> Recipe:
        """See `Settings`."""
        return recommended_recipe(
            self.rows,
            self.range_images,
            self.activation_range,
            self.tuning_iterations,
            self.learning_rate,
            self.rounding_rate,
            deployable=False,
            memory_bytes=int(self.memory_gib * 2**30),
        )


METHOD = Method("Recommended", "this library", Config, applies_always)
