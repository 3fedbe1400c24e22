"""Round-to-nearest: every weight to the nearest code of its channel's min-max range; nothing is learned.

Activation ranges are the widest min-max range over the calibration rows, one scale a tensor for all time steps. This is
the plain baseline that any method has to beat.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from baselines import Arguments, Method, Settings, applies_always
from tfmq.network.calibration import CalibrationSet
from tfmq.network.unet import UNet
from tfmq.plan import Protocol
from tfmq.precision import Precision
from tfmq.quantization import QuantizationConfig, QuantizationReport, quantize_


@dataclass(frozen=True)
class Config(Settings):
    """Steps of the schedule and images at each step that activation ranges are taken from."""

    steps: int = 20
    images: int = 64
    batch: int = 64

    def arguments(self, pool: CalibrationSet, protocol: Protocol, generator: torch.Generator) -> Arguments:
        """See `Settings`."""
        setting = QuantizationConfig(weight_range="minmax", activation_batch=self.batch, batch=self.batch)
        rows = pool.spaced(self.steps, self.images)
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


METHOD = Method("Round-to-nearest", "plain baseline", Config, quantize, applies_always)
