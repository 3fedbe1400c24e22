"""PTQD with step-aware mixed precision of activations (He et al., NeurIPS 2023, arXiv 2305.10657).

At each time step activations get the smallest width b, of 4 bits and the precision's own, for which SNR_Q(t, b) =
||eps|| / ||eps_hat_b - eps|| is above SNR_F(t) = alpha_t^2 / sigma_t^2, the signal-to-noise ratio of the latents;
where none is, the largest. Noisy steps, the first ones, so get 4 bits. Activation ranges and step sizes are
calibrated for the steps of each width by themselves. Weights keep the precision's bits; the correction of the row
`ptqd` is measured on the mixed network. Which step got which width stands in each cell's record.

The rule is the paper's, where no code is known. Open are whether the ratio is meant squared (``snr_power``), and the
ranges with which a width is judged; here they are those of all steps, before step sizes are learned. Read as it
stands, the rule may give 4 bits to far more steps than the paper does (on ImageNet to 5 of 20). Layers that a
protocol keeps at 8 bits keep them at all steps.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from baselines import Method, _ptqd
from tfmq.cost import Shapes
from tfmq.passes import Cost, Memory, Pass, Recipe
from tfmq.passes.activation_ranges import ActivationRanges
from tfmq.passes.correction import quantized_noise, trajectory_evaluations
from tfmq.passes.step_bits import Ranges, forward_snr, mix_ranges, quantization_snr, ranges_of, set_bits, smallest_bits
from tfmq.passes.step_sizes import StepSizes
from tfmq.plan import activation_quantizers, plan_for
from tfmq.precision import FULL, Precision
from tfmq.session import Session

SMALL = 4


@dataclass(frozen=True)
class Config(_ptqd.Config):
    """See `_ptqd.Config`; ``snr_power`` is that of ||eps|| / ||eps_hat - eps|| where it is compared."""

    snr_power: float = 1.0

    def __post_init__(self) -> None:
        """Raises ValueError for settings that leave activations nothing to mix."""
        super().__post_init__()
        if self.activation_scales != "shared":
            raise ValueError(
                f"activation_scales is {self.activation_scales!r}: each width has ranges of its own steps here, which "
                "are 'shared' among these"
            )
        if self.caching is not None:
            raise ValueError(f"caching is {self.caching!r}: looked-up features have one width; leave it out")

    def recipe(self) -> Recipe:
        """See `Settings`: that of PTQD, but for its step sizes, which are learned for each width by itself."""
        passes = super().recipe()
        (ranges,) = _of(passes, ActivationRanges)
        step_sizes = _of(passes, StepSizes)
        widths = MixedWidths(ranges, step_sizes, self.correction_images, self.range_batch, self.snr_power)
        *base, correction = (step for step in passes if step not in step_sizes)
        return *base, widths, correction


@dataclass(frozen=True)
class MixedWidths(Pass):
    """Choose a width of activations at each time step, and calibrate each width for its steps.

    Attributes:
        ranges: how the ranges of a width are calibrated.
        step_sizes: how its step sizes are learned: one pass, or none.
        images: of the pool, on whose trajectory the smaller width is judged.
        batch: images evaluated at once for it.
        snr_power: see `Config`.
    """

    ranges: ActivationRanges
    step_sizes: tuple[StepSizes, ...]
    images: int
    batch: int
    snr_power: float

    def run(self, session: Session, rows: None) -> None:
        """See `Pass`; the report's details have the width and both ratios at each step."""
        network, pool = session.network, session.pool
        plans = {
            bits: plan_for(
                session.full, session.backbone, replace(session.precision, activation_bits=bits), session.protocol
            )
            for bits in (SMALL, session.precision.activation_bits)
        }

        def calibrate(bits: int, among: Tensor) -> None:
            """Ranges at a width, from the rows of these time steps."""
            set_bits(network, plans[bits])
            for quantizer in activation_quantizers(network).values():
                quantizer.enabled = False
            self.ranges.run(session, self.ranges.data(pool, session.generator, among).to(network.device))

        timesteps, where = pool.timesteps.unique(return_inverse=True)
        calibrate(SMALL, timesteps)
        images = min(self.images, pool.images)
        predicted = [quantized_noise(network, pool, step, images, self.batch).cpu() for step in range(pool.steps)]
        session.count_evaluations(trajectory_evaluations(pool, images))
        snr = quantization_snr(pool.noise[:, :images].cpu(), torch.stack(predicted), pool.timesteps)
        snr = snr**self.snr_power
        alphas = torch.zeros(len(timesteps), dtype=torch.float64).scatter_(0, where, pool.alphas[:-1].cpu())
        needed = forward_snr(alphas)
        chosen = smallest_bits({SMALL: snr}, needed, session.precision.activation_bits)
        at_bits: dict[int, Ranges] = {}
        for bits in chosen.unique().tolist():
            own = timesteps[chosen == bits]
            calibrate(bits, own)
            for step in self.step_sizes:
                step.run(session, step.data(pool, session.generator, own).to(network.device))
            at_bits[bits] = ranges_of(network)
        set_bits(network, plans[session.precision.activation_bits])
        network.step_tracker.steps = timesteps
        mix_ranges(network, at_bits, chosen)
        session.report.details |= {
            "activation_bits": _by_step(timesteps, chosen),
            "quantization_snr": _by_step(timesteps, snr),
            "forward_snr": _by_step(timesteps, needed),
        }

    def cost(self, shapes: Shapes, rows: None) -> Cost:
        """See `Pass`. The most that is spent: which widths are learned, and on how many steps, a measurement decides.

        The small width is calibrated for judging it, then each width, if both are chosen.
        """
        generator = torch.Generator()
        ranges = Cost(len(self.ranges.draw(shapes.pool, generator)))
        found = ranges + Cost(trajectory_evaluations(shapes.pool, self.images))
        for _ in (SMALL, shapes.precision.activation_bits):
            found += ranges
            for step in self.step_sizes:
                found += step.cost(shapes, step.draw(shapes.pool, generator))
        return found

    def memory(self, shapes: Shapes, rows: None) -> Memory:
        """See `Pass`."""
        generator = torch.Generator()
        shapes.calibrated = False
        found = [self.ranges.memory(shapes, self.ranges.draw(shapes.pool, generator))]
        shapes.calibrated = True
        found += [step.memory(shapes, step.draw(shapes.pool, generator)) for step in self.step_sizes]
        return Memory(max(memory.held for memory in found), max(memory.on_disk for memory in found))


def _of(passes: Iterable[Pass], kind: type[Pass]) -> tuple[Pass, ...]:
    """The passes of a kind."""
    return tuple(step for step in passes if isinstance(step, kind))


def _by_step(timesteps: Tensor, values: Tensor) -> dict[str, float]:
    return {str(step): value for step, value in zip(timesteps.tolist(), values.tolist(), strict=True)}


def objection(precision: Precision) -> str:
    """Mixing needs activations, at more than the smallest width."""
    if precision.activation_bits == FULL:
        return "it chooses widths of activations, and this precision leaves these in full precision"
    if precision.activation_bits <= SMALL:
        return f"it mixes {SMALL} bits with the precision's own width, which has to be larger"
    return ""


METHOD = Method("PTQD, mixed", "arXiv 2305.10657", Config, objection, _ptqd.PUBLISHED, executable=False)
