"""What TDQ's two rows share: its grids, its draw of calibration rows, its networks and how they are fitted."""

from __future__ import annotations

from dataclasses import dataclass

from baselines import Settings
from tfmq.network.calibration import NormallyDistributed
from tfmq.passes import Recipe
from tfmq.passes.predicted_step_sizes import PredictedStepSizes
from tfmq.passes.step_network import FitConfig
from tfmq.passes.weight_ranges import RoundToNearest, WeightRanges
from tfmq.plan import Protocol
from tfmq.precision import Precision

PUBLISHED = Protocol("published", {"boundary": 32, "time_embedding": 32, "time_projections": 32})


@dataclass(frozen=True)
class Config(Settings):
    """Settings of the networks and of their data.

    Attributes:
        rows: calibration rows, with normally distributed time steps.
        mean, deviation: of these, as shares of the schedule from its clean end; PTQ4DM's released ones.
        values: entries of each activation drawn from each row.
        fit_iterations, fit_batch, fit_learning_rate: of fitting the networks to these; a batch is of rows.
        weight_decay: of AdamW, as released.
        forward_batch: rows evaluated at once.
    """

    rows: int = 1024
    mean: float = 0.4
    deviation: float = 0.4
    values: int = 64
    fit_iterations: int = 300
    fit_batch: int = 64
    fit_learning_rate: float = 3e-3
    weight_decay: float = 0.01
    forward_batch: int = 64

    def recipe(self) -> Recipe:
        """See `Settings`."""
        return WeightRanges("search"), RoundToNearest(), self.step_sizes()

    def step_sizes(self) -> PredictedStepSizes:
        """The networks of all activations."""
        fit = FitConfig(self.fit_iterations, self.fit_batch, self.fit_learning_rate, self.weight_decay)
        rows = NormallyDistributed(self.rows, self.mean, self.deviation)
        return PredictedStepSizes(fit, rows, self.values, self.forward_batch)


def objection(precision: Precision) -> str:
    """TDQ needs quantised activations."""
    if precision.quantizes_activations:
        return ""
    return "TDQ predicts step sizes of activations: without quantised activations nothing of it is left"
