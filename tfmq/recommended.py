"""The recipe that this library recommends: rounding by second moments, activation ranges, tuning from end to end."""

from __future__ import annotations

from tfmq.modules.fake_quantize import ActivationRange
from tfmq.network.calibration import Spaced
from tfmq.network.fresh_noise import FreshNoise
from tfmq.passes import Pass, Recipe
from tfmq.passes.activation_ranges import ActivationRanges
from tfmq.passes.deployable import Deployable
from tfmq.passes.noise_distillation import NoiseDistillation
from tfmq.passes.second_order_rounding import SecondOrderRounding

BATCH = 16


def recommended_recipe(
    rows: int = 640,
    range_images: int = 24,
    activation_range: ActivationRange = "minmax",
    tuning_iterations: int = 100,
    learning_rate: float = 3e-4,
    rounding_rate: float = 0.0,
    deployable: bool = True,
    memory_bytes: int = 8 * 2**30,
) -> Recipe:
    """The passes for `quantize_`, in their order.

    Weights are rounded in closed form against full-precision outputs, activations get running ranges, and scales, step
    sizes, biases and norms are tuned with the whole network running. `python -m benchmarks study` measures what each
    part gains and takes.

    Args:
        rows: that second moments are taken from: the pool's samples with noise of their own.
        range_images: images of the pool that activation ranges are taken from, at every time step.
        activation_range: how ranges are found in each batch, as in `ActivationRanges`.
        tuning_iterations: of the tuning, which takes most of the time; 0 leaves it out.
        learning_rate: of the tuning.
        rounding_rate: of roundings, which stay as they are at 0; at 4 bits of activations 0.01 helps.
        deployable: take the grids that integer kernels execute without a detour.
        memory_bytes: as in `BlockReconstruction`.

    Raises ValueError for a number out of its range.
    """
    if tuning_iterations < 0:
        raise ValueError(f"tuning_iterations is {tuning_iterations}: it must be a whole number of at least 0")
    passes: list[Pass] = [Deployable()] if deployable else []
    passes.append(SecondOrderRounding(data=FreshNoise(rows), memory_bytes=memory_bytes))
    ranges = Spaced(None, range_images, shuffled=True)
    passes.append(ActivationRanges(ranges, activation_range, momentum=0.95, batch=BATCH))
    if tuning_iterations:
        data, rates = FreshNoise(tuning_iterations * BATCH), (learning_rate,) * 3
        passes.append(NoiseDistillation(tuning_iterations, BATCH, *rates, rounding_rate, data=data))
    return tuple(passes)
