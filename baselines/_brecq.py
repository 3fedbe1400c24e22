"""The recipe that the block-wise methods share: AdaRound within BRECQ (arXiv 2102.05426), then activation ranges.

Weight ranges are searched, roundings learned block by block from streamed inputs, activation ranges averaged over
batches. What the rows that build on it add or leave out are settings here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from baselines import Arguments, Settings
from tfmq.modules.fake_quantize import ActivationRange
from tfmq.network.calibration import CalibrationSet
from tfmq.network.unet import UNet
from tfmq.passes.reconstruction import RoundingConfig, StepSizeConfig
from tfmq.passes.temporal import Caching
from tfmq.plan import Protocol
from tfmq.precision import FULL, Precision
from tfmq.quantization import ActivationScales, QuantizationConfig, QuantizationReport, quantize_

Temporal = Literal["blocks", "joint", "frozen", "full_precision"]


@dataclass(frozen=True)
class Config(Settings):
    """Settings; the defaults are those of TFMQ-DM's released LSUN recipe without its treatment of time.

    Attributes:
        steps, images: uniformly spaced steps of the pool, and images at each, for learning roundings and step sizes.
        range_steps, range_images: the same for activation ranges; None takes every step of the schedule.
        iterations, learning_rate, batch: of the rounding of each block.
        temporal: how layers that depend on the time step alone are rounded. ``blocks``: the embedding layers one by
            one, each projection with its residual block; ``joint``: all together on the finite set of steps;
            ``frozen``: to nearest in min-max ranges; ``full_precision``: not at all.
        temporal_iterations: of the joint reconstruction.
        activation_scales: ``shared``, ``temporal`` (finite-set calibration) or ``per_step``.
        activation_range: ``minmax``, ``search`` (the best of 80) or ``thresholds`` (PTQ4DM's) in each batch.
        momentum: of the running activation ranges, over batches of ``range_batch`` shuffled rows, which are of one time
            step where scales are ``per_step``.
        split_shortcuts: own ranges for the two halves of concatenated shortcuts.
        activation_iterations, activation_learning_rate: of the step sizes of each block; 0 iterations learn none.
        caching: which temporal features are looked up in a table: ``all``, or by selection for each ``projection`` or
            at each ``step``; None computes them.
        memory_gib: most of the host's memory that calibration rows waiting between blocks may take; where they take
            more, they wait on the disk.
    """

    steps: int = 20
    images: int = 256
    range_steps: int | None = None
    range_images: int = 256
    iterations: int = 20_000
    learning_rate: float = 1e-3
    batch: int = 32
    temporal: Temporal = "blocks"
    temporal_iterations: int = 20_000
    activation_scales: ActivationScales = "shared"
    activation_range: ActivationRange = "minmax"
    momentum: float = 0.95
    range_batch: int = 16
    split_shortcuts: bool = False
    activation_iterations: int = 0
    activation_learning_rate: float = 4e-4
    caching: Caching | None = None
    memory_gib: float = 64.0

    def arguments(self, pool: CalibrationSet, protocol: Protocol, generator: torch.Generator) -> Arguments:
        """See `Settings`."""
        if self.temporal == "full_precision":
            protocol = replace(protocol, bits={**protocol.bits, "time_embedding": FULL, "time_projections": FULL})
        rounding = RoundingConfig(self.iterations, self.batch, self.learning_rate)
        step_sizes = None
        if self.activation_iterations:
            step_sizes = StepSizeConfig(self.activation_iterations, self.batch, self.activation_learning_rate)
        setting = QuantizationConfig(
            split_shortcuts=self.split_shortcuts,
            freeze_temporal=self.temporal == "frozen",
            temporal=replace(rounding, iterations=self.temporal_iterations) if self.temporal == "joint" else None,
            rounding=rounding,
            activation_range=self.activation_range,
            activation_momentum=self.momentum,
            activation_batch=self.range_batch,
            activation_scales=self.activation_scales,
            step_sizes=step_sizes,
            caching=self.caching,
            memory_bytes=int(self.memory_gib * 2**30),
        )
        rows = pool.spaced(self.steps, self.images)
        range_steps = pool.steps if self.range_steps is None else self.range_steps
        range_rows = pool.spaced(range_steps, self.range_images).shuffled(generator)
        return setting, rows, range_rows, protocol


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
