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

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from baselines import Method, _brecq, _ptqd
from tfmq.effort import PlannedEffort
from tfmq.network.calibration import CalibrationSet
from tfmq.network.unet import UNet, UNetLayout
from tfmq.passes.correction import quantized_noise
from tfmq.passes.reconstruction import StepSizeConfig, reconstruct_activations
from tfmq.passes.step_bits import Ranges, forward_snr, mix_ranges, quantization_snr, ranges_of, set_bits, smallest_bits
from tfmq.plan import Protocol, coverage, plan_for
from tfmq.precision import FULL, Precision
from tfmq.quantization import QuantizationConfig, QuantizationReport, calibrate_activations

SMALL = 4


@dataclass(frozen=True)
class Config(_ptqd.Config):
    """See `_ptqd.Config`; ``snr_power`` is that of ||eps|| / ||eps_hat - eps|| where it is compared."""

    snr_power: float = 1.0

    def effort(self, unet: UNet, pool: CalibrationSet, precision: Precision, protocol: Protocol) -> PlannedEffort:
        """The most that `quantize` will spend: which widths it learns, and on how many steps, the measurement decides.

        It calibrates the small width for judging it, then each width, if both are chosen; one pass over the trajectory
        judges, one measures the correction.
        """
        whole, base = (
            _ptqd.Config.effort(config, unet, pool, precision, protocol)
            for config in (self, replace(self, activation_iterations=0))
        )
        ranges = base.activation_evaluations - _ptqd.correction_evaluations(pool, self)
        widths = len(_widths(precision))
        learning = whole.activation_evaluations - base.activation_evaluations
        judging = ranges + _ptqd.correction_evaluations(pool, self)
        return replace(
            whole,
            activation_evaluations=base.activation_evaluations + judging + widths * (ranges + learning),
            optimizer_steps=base.optimizer_steps + widths * (whole.optimizer_steps - base.optimizer_steps),
            learned_rows=base.learned_rows + widths * (whole.learned_rows - base.learned_rows),
        )


def quantize(
    unet: UNet,
    pool: CalibrationSet,
    precision: Precision,
    config: Config,
    generator: torch.Generator,
    protocol: Protocol,
) -> QuantizationReport:
    """Quantise ``unet`` in place, its activations at the width chosen for each step, and give it its correction."""
    full, layout = copy.deepcopy(unet), UNetLayout.of(unet)
    base = replace(config, activation_iterations=0)
    report = _brecq.quantize(unet, pool, precision, base, generator, protocol)
    plans = {b: plan_for(full, layout, replace(precision, activation_bits=b), protocol) for b in _widths(precision)}
    setting = QuantizationConfig(
        activation_range=config.activation_range,
        activation_momentum=config.momentum,
        activation_batch=config.range_batch,
        memory_bytes=int(config.memory_gib * 2**30),
    )
    range_steps = pool.steps if config.range_steps is None else config.range_steps

    def calibrate(bits: int, among: Tensor) -> None:
        """Ranges at a width, from the rows of these time steps."""
        set_bits(unet, plans[bits])
        rows = pool.spaced(range_steps, config.range_images, among).shuffled(generator).to(unet.device)
        calibrate_activations(unet, layout, rows, setting)
        report.effort.unet_evaluations += len(rows)

    with report.timed("activations"):
        timesteps, where = pool.timesteps.unique(return_inverse=True)
        calibrate(SMALL, timesteps)
        images = min(config.correction_images, pool.images)
        predicted = [quantized_noise(unet, pool, step, images, config.range_batch).cpu() for step in range(pool.steps)]
        report.effort.unet_evaluations += (1 if pool.unconditional is None else 2) * pool.steps * images
        snr = quantization_snr(pool.noise[:, :images].cpu(), torch.stack(predicted), pool.timesteps)
        snr = snr**config.snr_power
        alphas = torch.zeros(len(timesteps), dtype=torch.float64).scatter_(0, where, pool.alphas[:-1].cpu())
        needed = forward_snr(alphas)
        chosen = smallest_bits({SMALL: snr}, needed, precision.activation_bits)
        at_bits: dict[int, Ranges] = {}
        for bits in chosen.unique().tolist():
            own = timesteps[chosen == bits]
            calibrate(bits, own)
            if config.activation_iterations:
                step_sizes = StepSizeConfig(config.activation_iterations, config.batch, config.activation_learning_rate)
                rows = pool.spaced(config.steps, config.images, own).to(unet.device)
                limits = {"batch": setting.batch, "memory_bytes": setting.memory_bytes}
                reconstruct_activations(unet, full, layout, rows, step_sizes, generator, report.effort, **limits)
            at_bits[bits] = ranges_of(unet)
        set_bits(unet, plans[precision.activation_bits])
        unet.step_tracker.steps = timesteps
        mix_ranges(unet, at_bits, chosen)
    _ptqd.correct(unet, pool, config, report)
    report.coverage = coverage(unet)
    report.details["activation_bits"] = _by_step(timesteps, chosen)
    report.details["quantization_snr"] = _by_step(timesteps, snr)
    report.details["forward_snr"] = _by_step(timesteps, needed)
    return report


def _widths(precision: Precision) -> tuple[int, int]:
    return SMALL, precision.activation_bits


def _by_step(timesteps: Tensor, values: Tensor) -> dict[str, float]:
    return {str(step): value for step, value in zip(timesteps.tolist(), values.tolist(), strict=True)}


def objection(precision: Precision) -> str:
    """Mixing needs activations, at more than the smallest width."""
    if precision.activation_bits == FULL:
        return "it chooses widths of activations, and this precision leaves these in full precision"
    if precision.activation_bits <= SMALL:
        return f"it mixes {SMALL} bits with the precision's own width, which has to be larger"
    return ""


METHOD = Method("PTQD, mixed", "arXiv 2305.10657", Config, quantize, objection, _ptqd.PUBLISHED)
