"""The recipe that TCAQ-DM and its parts share: the block-wise base, with any of the three parts that the paper adds."""

from __future__ import annotations

from dataclasses import dataclass

from baselines import _brecq
from tfmq.network.calibration import Spaced
from tfmq.passes import Recipe
from tfmq.passes.activation_ranges import ActivationRanges
from tfmq.passes.adaptive_probabilities import AdaptiveProbabilities
from tfmq.passes.channel_scales import ScaleChannels, ScaledLayers
from tfmq.passes.recalibration import Recalibration
from tfmq.passes.reconstruction import RoundingConfig, StepSizeConfig
from tfmq.passes.weight_ranges import WeightRanges
from tfmq.settings import check_choices


@dataclass(frozen=True)
class Config(_brecq.Config):
    """Settings of `_brecq.Config`, and of the three parts; a row without a part leaves its settings unused.

    Attributes:
        scales_channels: reparameterise the layers ``scaled_layers``.
        groups: of time steps, whose ranges are weighted.
        strength: 1 makes input ranges even; less leaves a share of them where weights are wide.
        most_scale: by how much a channel is scaled at most.
        adapts_probabilities: choose the grid of attention probabilities by their distribution, at every step where
            ``adapts_per_step``.
        samples, significance: values of each batch that are tested, and the level of the test.
        range_images: also images at every step for the ranges of both parts above.
        rounds: of recalibration; 0 for none.
        round_iterations, round_activation_iterations: of roundings and of step sizes in each round, on as many rows as
            the reconstruction before; 0 of the latter leave step sizes as they are.
    """

    scales_channels: bool = False
    groups: int = 10
    strength: float = 1.0
    most_scale: float = 10.0
    scaled_layers: ScaledLayers = "convolutions"
    adapts_probabilities: bool = False
    adapts_per_step: bool = True
    samples: int = 4096
    significance: float = 0.05
    rounds: int = 0
    round_iterations: int = 5_000
    round_activation_iterations: int = 1_000

    def __post_init__(self) -> None:
        check_choices(self)

    def recipe(self) -> Recipe:
        """See `Settings`."""
        passes = list(super().recipe())
        rows = Spaced(None, self.range_images)
        if self.scales_channels:
            scaling = ScaleChannels(self.groups, self.strength, self.most_scale, self.scaled_layers, rows)
            passes.insert(next(i for i, each in enumerate(passes) if isinstance(each, WeightRanges)), scaling)
        if self.adapts_probabilities:
            adapting = AdaptiveProbabilities(rows, self.samples, self.significance, self.adapts_per_step)
            passes.insert(next(i for i, each in enumerate(passes) if isinstance(each, ActivationRanges)), adapting)
        if self.rounds:
            rounding = RoundingConfig(self.round_iterations, self.batch, self.learning_rate)
            step_sizes = None
            if self.round_activation_iterations:
                rate = self.activation_learning_rate
                step_sizes = StepSizeConfig(self.round_activation_iterations, self.batch, rate)
            data, memory = Spaced(self.steps, self.images), int(self.memory_gib * 2**30)
            passes.append(Recalibration(self.rounds, rounding, step_sizes, data, memory_bytes=memory))
        return tuple(passes)
