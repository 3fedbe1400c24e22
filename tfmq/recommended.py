"""The recipe that this library recommends."""

from __future__ import annotations

from tfmq.modules.fake_quantize import FEW_BITS
from tfmq.network.calibration import Spaced
from tfmq.network.fresh_noise import FreshNoise
from tfmq.passes import Pass, Recipe
from tfmq.passes.activation_ranges import ActivationRanges
from tfmq.passes.deployable import Deployable
from tfmq.passes.noise_distillation import NoiseDistillation
from tfmq.passes.range_margin import RangeMargin
from tfmq.passes.second_order_rounding import SecondOrderRounding

BATCH = 16
RATES = {"scale_rate": 1e-3, "step_size_rate": 3e-3, "vector_rate": 1e-3, "rounding_rate": 0.01}


def recommended_recipe(
    rows: int = 640,
    range_images: int = 128,
    per_step: bool = True,
    tuning_iterations: int = 200,
    deployable: bool = True,
    batch: int | None = None,
    memory_bytes: int = 8 * 2**30,
    range_margin: float = 0.0,
) -> Recipe:
    """The passes for `quantize_`, in their order.

    Weights are rounded in closed form against full-precision outputs, and activations get ranges. Where these have
    fewer than 6 bits, scales, step sizes, biases, norms and roundings are then tuned with the whole network running;
    with 8, that gains little. `python -m benchmarks study` measures what each part gains and takes.

    Args:
        rows: how many rows of `FreshNoise` weights are rounded by.
        range_images: images of the pool that activation ranges are taken from, at every time step.
        per_step: give each time step a range of its own. The network then runs only at the time steps of the pool.
        tuning_iterations: iterations of the tuning; 0 leaves it out.
        deployable: take the grids that integer kernels execute directly (`Deployable`).
        batch: rows evaluated at once. None is for small networks: 16, but all of them while weights are rounded, so
            that each layer of a block is rounded by what it sees once those before it are. A network of the size of
            Stable Diffusion's needs a number, such as 8.
        memory_bytes: as in `BlockReconstruction`.
        range_margin: share by which ranges of 6 bits or more are widened. With 0.2, 16 images do nearly what 128 do, in
            about half the time.

    Raises ValueError for a number out of its range. `quantize_` refuses a pool that was recorded with a ControlNet.
    """
    if not isinstance(tuning_iterations, int) or tuning_iterations < 0:
        raise ValueError(f"tuning_iterations is {tuning_iterations!r}: it must be a whole number of at least 0")
    passes: list[Pass] = [Deployable()] if deployable else []
    data, ranges = FreshNoise(rows), Spaced(None, range_images, shuffled=True)
    if batch is None:
        passes.append(SecondOrderRounding(data=data, memory_bytes=memory_bytes))
    else:
        passes.append(SecondOrderRounding(data=data, in_turn=False, batch=batch, memory_bytes=memory_bytes))
    at_once = batch or BATCH
    passes.append(ActivationRanges(ranges, "by_bits", momentum=0.95, batch=at_once, per_step=per_step))
    if range_margin:
        passes.append(RangeMargin(range_margin))
    if tuning_iterations:
        data, few = FreshNoise(tuning_iterations * at_once), FEW_BITS - 1
        passes.append(NoiseDistillation(tuning_iterations, at_once, **RATES, data=data, most_activation_bits=few))
    return tuple(passes)
