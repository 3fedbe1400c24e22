"""TFMQ-DM: temporal feature maintenance quantisation (Huang et al., CVPR 2024, arXiv 2311.16503).

All layers that depend on the time step alone form the temporal information block. It is reconstructed jointly on the
finite set of sampling steps (temporal-information-aware reconstruction), instead of each projection with its residual
block, and its activations get one min-max range for each step (finite-set calibration). The other layers are
reconstructed block by block (AdaRound within BRECQ); their activations keep one running range for all steps.

Where the released code and the paper differ, and what is done here:

- The code keeps a range for each step at every activation of the network; the paper, at those of the temporal block.
  The paper is followed; ``activation_scales = "per_step"`` gives the code's behaviour.
- The code leaves input and output layer, first time-embedding layer, shortcuts and resampling in full precision; here
  the suite's protocol decides what is quantised, the same for every method.
- Step sizes of activations are not learned, in either.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from baselines import Method, applies_always
from tfmq.calibration import CalibrationSet
from tfmq.precision import Precision
from tfmq.quantization import ActivationScales, QuantizationConfig, QuantizationReport, quantize_
from tfmq.reconstruction import RoundingConfig
from tfmq.unet import UNet


@dataclass(frozen=True)
class Config:
    """Settings; the defaults are those of the released LSUN recipe.

    Attributes:
        steps, images: uniformly spaced steps of the pool, and images at each, for learning roundings.
        range_images: images at every step of the schedule for activation ranges.
        iterations, learning_rate, batch: of the rounding of each block.
        temporal_iterations: of the joint reconstruction of the temporal information block.
        momentum: of the running activation ranges, over batches of ``range_batch`` shuffled rows.
        activation_scales: ``shared``, ``temporal`` (finite-set calibration) or ``per_step``.
        memory_gib: most that calibration rows waiting between blocks may take.
    """

    steps: int = 20
    images: int = 256
    range_images: int = 256
    iterations: int = 20_000
    temporal_iterations: int = 20_000
    learning_rate: float = 1e-3
    batch: int = 32
    momentum: float = 0.95
    range_batch: int = 16
    activation_scales: ActivationScales = "temporal"
    memory_gib: float = 64.0


def quantize(
    unet: UNet, pool: CalibrationSet, precision: Precision, config: Config, generator: torch.Generator
) -> QuantizationReport:
    """Quantise ``unet`` in place."""
    setting = QuantizationConfig(
        temporal=RoundingConfig(config.temporal_iterations, config.batch, config.learning_rate),
        rounding=RoundingConfig(config.iterations, config.batch, config.learning_rate),
        activation_momentum=config.momentum,
        activation_batch=config.range_batch,
        activation_scales=config.activation_scales,
        memory_bytes=int(config.memory_gib * 2**30),
    )
    rows = pool.spaced(config.steps, config.images)
    activation_rows = pool.spaced(pool.steps, config.range_images).shuffled(generator)
    return quantize_(unet, precision, setting, rows, activation_rows, pool.timesteps, generator)


METHOD = Method("TFMQ-DM", "arXiv 2311.16503", Config, quantize, applies_always)
