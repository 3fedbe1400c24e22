"""The recipe of PTQ4DM: ranges by its 100-threshold search, on calibration rows with normally distributed steps."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from baselines import Settings
from tfmq.network.calibration import CalibrationSet, NormallyDistributed, normal_steps
from tfmq.network.rows import CalibrationRows
from tfmq.passes import Recipe
from tfmq.passes.activation_ranges import ActivationRanges
from tfmq.passes.weight_ranges import RoundToNearest, WeightRanges


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

    def recipe(self) -> Recipe:
        """See `Settings`."""
        draw = Mispaired if self.mispaired else NormallyDistributed
        data = draw(self.rows, self.mean, self.deviation, shuffled=True)
        ranges = ActivationRanges(data, "thresholds", self.momentum, self.range_batch)
        return WeightRanges("thresholds"), RoundToNearest(), ranges


@dataclass(frozen=True)
class Mispaired(NormallyDistributed):
    """Rows as PTQ4DM's released code collects them: of T steps, a drawn number j labels what step j puts out.

    Its loop counts from the noisiest step, while the label counts from the cleanest; and the label itself, 0 .. T - 1,
    is the time step that the network is given, where sampling gives it one of the training schedule.
    """

    def rows_of(self, pool: CalibrationSet, generator: torch.Generator) -> CalibrationRows:
        """See `NormallyDistributed`."""
        drawn = normal_steps(self.rows, self.mean, self.deviation_in(pool), pool.steps, generator)
        images = torch.arange(self.rows) % pool.images
        rows = pool.rows(drawn, images)
        put_out = torch.cat([pool.latents[1:], pool.samples[None]])[drawn, images]
        halves = len(rows) // self.rows
        return replace(rows, latents=put_out.repeat(halves, 1, 1, 1), timesteps=drawn.repeat(halves))
