"""The recipe of PTQD: a block-wise base whose prediction is corrected in the sampler."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from baselines import _brecq
from tfmq.effort import PlannedEffort
from tfmq.modules.fake_quantize import ActivationRange
from tfmq.network.calibration import CalibrationSet
from tfmq.network.unet import UNet
from tfmq.passes.correction import attach_correction, measure_correction
from tfmq.plan import Protocol
from tfmq.precision import Precision
from tfmq.quantization import QuantizationReport

PUBLISHED = Protocol(
    "published", {"boundary": 8, "first_time_layer": 8, "shortcuts": 32, "downsampling": 32, "attention_products": 32}
)


@dataclass(frozen=True)
class Config(_brecq.Config):
    """Settings of the base, see `_brecq.Config`, and of the correction; the defaults are those of the released recipe.

    20 steps x 51 images stand for its 1,024 random rows, 16 x 2 for the 32 random rows of its activation ranges.

    Attributes:
        correction_images: images of the pool that the error is measured on at every step.
    """

    images: int = 51
    range_steps: int | None = 16
    range_images: int = 2
    range_batch: int = 32
    iterations: int = 10_000
    batch: int = 8
    activation_range: ActivationRange = "search"
    activation_iterations: int = 5_000
    correction_images: int = 1024

    def effort(self, unet: UNet, pool: CalibrationSet, precision: Precision, protocol: Protocol) -> PlannedEffort:
        """See `Settings`."""
        base = super().effort(unet, pool, precision, protocol)
        return replace(base, activation_evaluations=base.activation_evaluations + correction_evaluations(pool, self))


def quantize(
    unet: UNet,
    pool: CalibrationSet,
    precision: Precision,
    config: Config,
    generator: torch.Generator,
    protocol: Protocol,
) -> QuantizationReport:
    """Quantise ``unet`` in place and give it its correction."""
    report = _brecq.quantize(unet, pool, precision, config, generator, protocol)
    correct(unet, pool, config, report)
    return report


def correct(unet: UNet, pool: CalibrationSet, config: Config, report: QuantizationReport) -> None:
    """Measure the quantised UNet's error on the pool's trajectory and store the correction in it."""
    with report.timed("activations"):
        attach_correction(unet, measure_correction(unet, pool, config.correction_images, config.range_batch))
    report.effort.unet_evaluations += correction_evaluations(pool, config)


def correction_evaluations(pool: CalibrationSet, config: Config) -> int:
    """Sample evaluations that one pass over the pool's trajectory takes."""
    halves = 1 if pool.unconditional is None else 2
    return halves * pool.steps * min(config.correction_images, pool.images)
