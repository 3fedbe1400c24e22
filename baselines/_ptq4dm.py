"""The recipe of PTQ4DM: ranges by its 100-threshold search, on calibration rows with normally distributed steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from baselines import Arguments, Settings
from tfmq.network.calibration import CalibrationRows, CalibrationSet, normal_steps
from tfmq.network.unet import UNet
from tfmq.plan import Protocol
from tfmq.precision import Precision
from tfmq.quantization import QuantizationConfig, QuantizationReport, quantize_


@dataclass(frozen=True)
class Config(Settings):
    """Settings; the defaults are the paper's.

    Attributes:
        rows: calibration rows, taken from the pool's images in turn; under guidance, of each half.
        mean: of the drawn steps, as a share of the schedule from its clean end.
        deviation: of the drawn steps, likewise; None for sqrt(T / 2) steps of a schedule of T.
        mispaired: pair latents and time steps as the released code does (see `ptq4dm_mispaired`).
        momentum: of the running activation ranges, over batches of ``range_batch`` shuffled rows.
    """

    rows: int = 1024
    mean: float = 0.4
    deviation: float | None = None
    mispaired: bool = False
    momentum: float = 0.9
    range_batch: int = 256

    def arguments(self, pool: CalibrationSet, protocol: Protocol, generator: torch.Generator) -> Arguments:
        """See `Settings`."""
        deviation = math.sqrt(pool.steps / 2) / pool.steps if self.deviation is None else self.deviation
        draw = mispaired_rows if self.mispaired else CalibrationSet.normal
        rows = draw(pool, self.rows, self.mean, deviation, generator).shuffled(generator)
        setting = QuantizationConfig(
            weight_range="thresholds",
            activation_range="thresholds",
            activation_momentum=self.momentum,
            activation_batch=self.range_batch,
        )
        return setting, rows, rows, protocol


def quantize(
    unet: UNet,
    pool: CalibrationSet,
    precision: Precision,
    config: Config,
    generator: torch.Generator,
    protocol: Protocol,
) -> QuantizationReport:
    """Quantise ``unet`` in place."""
    setting, rows, range_rows, protocol = config.arguments(pool, protocol, generator)
    return quantize_(unet, precision, setting, rows, range_rows, pool.timesteps, generator, protocol)


def mispaired_rows(
    pool: CalibrationSet, count: int, mean: float, deviation: float, generator: torch.Generator
) -> CalibrationRows:
    """Rows as PTQ4DM's released code collects them: of T steps, a drawn number j labels what step j puts out.

    Its loop counts from the noisiest step, while the label counts from the cleanest; and the label itself, 0 .. T - 1,
    is the time step that the UNet is given, where sampling gives it one of the training schedule.
    """
    drawn = normal_steps(count, mean, deviation, pool.steps, generator)
    images = torch.arange(count) % pool.images
    rows = pool.rows(drawn, images)
    put_out = torch.cat([pool.latents[1:], pool.samples[None]])[drawn, images]
    halves = len(rows) // count
    return CalibrationRows(put_out.repeat(halves, 1, 1, 1), drawn.repeat(halves), rows.context)
