"""What this library recommends: rounding by second moments, activation ranges, and a short tuning from end to end.

A combination of this suite, of no paper. Weights are rounded in closed form against full-precision outputs
(`tfmq.passes.second_order_rounding`), activations get running min-max ranges, and what the codes leave continuous is
tuned with the whole network running, by the error of its prediction (`tfmq.passes.noise_distillation`). Each part has
its papers where it stands. The study page (`python -m benchmarks study`) has what each part gains, and takes.
"""

from __future__ import annotations

from dataclasses import dataclass

from baselines import Method, Settings, applies_always
from tfmq.modules.fake_quantize import ActivationRange
from tfmq.network.calibration import Spaced
from tfmq.passes import Pass, Recipe
from tfmq.passes.activation_ranges import ActivationRanges
from tfmq.passes.noise_distillation import NoiseDistillation
from tfmq.passes.second_order_rounding import SecondOrderRounding


@dataclass(frozen=True)
class Config(Settings):
    """Settings, which are the same for all models.

    Attributes:
        steps, images: uniformly spaced steps of the pool, and images at each, that second moments are taken from.
        range_images: images at each step that activation ranges are taken from.
        activation_range: how they are found in each batch.
        momentum: of the running activation ranges, over batches of ``range_batch`` shuffled rows.
        tuning_iterations, batch: of the tuning from end to end; none is left out.
        scale_rate, step_size_rate, vector_rate, rounding_rate: its learning rates, as in `NoiseDistillation`.
        memory_gib: as in `prev`.
    """

    steps: int = 20
    images: int = 128
    range_images: int = 128
    activation_range: ActivationRange = "minmax"
    momentum: float = 0.95
    range_batch: int = 16
    tuning_iterations: int = 200
    batch: int = 16
    scale_rate: float = 1e-3
    step_size_rate: float = 1e-3
    vector_rate: float = 1e-3
    rounding_rate: float = 0.0
    memory_gib: float = 64.0

    def recipe(self) -> Recipe:
        """See `Settings`."""
        ranges = Spaced(None, self.range_images, shuffled=True)
        passes: list[Pass] = [
            SecondOrderRounding(data=Spaced(self.steps, self.images), memory_bytes=int(self.memory_gib * 2**30)),
            ActivationRanges(ranges, self.activation_range, self.momentum, self.range_batch),
        ]
        if self.tuning_iterations:
            rates = self.scale_rate, self.step_size_rate, self.vector_rate, self.rounding_rate
            data = Spaced(self.steps, self.images)
            passes.append(NoiseDistillation(self.tuning_iterations, self.batch, *rates, data=data))
        return tuple(passes)


METHOD = Method("Recommended", "this library", Config, applies_always)
