"""Q-Diffusion (Li et al., ICCV 2023, arXiv 2302.04304).

Calibrates on uniformly spaced time steps, learns roundings block by block (AdaRound within BRECQ), gives the two halves
of concatenated shortcuts ranges of their own, and learns activation step sizes. One activation scale serves all time
steps; the time-embedding layers are reconstructed one by one like any other layer, the projections with their block.

Where the released code and the paper differ, and what is done here:

- Splits: the paper presents them for every model, the LDM script has no flag for them; here they are always on.
- Activation ranges: the released recipes initialise on pure-noise inputs or on the noisiest steps first, so that a
  running average forgets the noisy ones; here rows are shuffled, as in its Stable Diffusion recipe.
- The rounding regulariser skips the second half of a split layer in the code; here both halves count.
- Reconstruction crashes on parts without parameters (its repository's issue 26); here these have nothing to learn.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from baselines import Method, applies_always
from tfmq.calibration import CalibrationSet
from tfmq.precision import Precision
from tfmq.quantization import QuantizationConfig, QuantizationReport, quantize_
from tfmq.reconstruction import RoundingConfig, StepSizeConfig
from tfmq.unet import UNet


@dataclass(frozen=True)
class Config:
    """Settings; the defaults are those of the released LSUN recipe.

    Attributes:
        steps, images: uniformly spaced steps of the pool, and images at each (20 x 256 = 5,120 rows).
        iterations, learning_rate: of the rounding of each block.
        activation_iterations, activation_learning_rate: of the step sizes of each block.
        batch: rows in a batch of either.
        momentum: of the running activation ranges, over batches of ``range_batch`` shuffled rows.
        memory_gib: most that calibration rows waiting between blocks may take.
    """

    steps: int = 20
    images: int = 256
    iterations: int = 20_000
    learning_rate: float = 1e-3
    activation_iterations: int = 5_000
    activation_learning_rate: float = 4e-4
    batch: int = 32
    momentum: float = 0.95
    range_batch: int = 64
    memory_gib: float = 64.0


def quantize(
    unet: UNet, pool: CalibrationSet, precision: Precision, config: Config, generator: torch.Generator
) -> QuantizationReport:
    """Quantise ``unet`` in place."""
    rows = pool.spaced(config.steps, config.images)
    setting = QuantizationConfig(
        split_shortcuts=True,
        rounding=RoundingConfig(config.iterations, config.batch, config.learning_rate),
        activation_momentum=config.momentum,
        activation_batch=config.range_batch,
        step_sizes=StepSizeConfig(config.activation_iterations, config.batch, config.activation_learning_rate),
        memory_bytes=int(config.memory_gib * 2**30),
    )
    return quantize_(unet, precision, setting, rows, rows.shuffled(generator), pool.timesteps, generator)


METHOD = Method("Q-Diffusion", "arXiv 2302.04304", Config, quantize, applies_always)
