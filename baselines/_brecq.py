"""The recipe that the block-wise methods share: AdaRound within BRECQ (arXiv 2102.05426), then activation ranges.

Weight ranges are searched, roundings learned block by block from streamed inputs, activation ranges averaged over
batches. Settings select what each row adds or leaves out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from baselines import Settings
from tfmq.modules.fake_quantize import ActivationRange
from tfmq.network.calibration import Spaced
from tfmq.passes import Pass, Recipe
from tfmq.passes.activation_ranges import ActivationRanges
from tfmq.passes.block_reconstruction import BlockReconstruction
from tfmq.passes.finite_set import FiniteSetCalibration
from tfmq.passes.grids import Grids
from tfmq.passes.leave_out import LeaveOut
from tfmq.passes.reconstruction import RoundingConfig, StepSizeConfig
from tfmq.passes.step_sizes import StepSizes
from tfmq.passes.temporal_cache import Caching, TemporalCache
from tfmq.passes.temporal_reconstruction import FreezeTemporal, TemporalReconstruction
from tfmq.passes.weight_ranges import WeightRanges
from tfmq.settings import check_choices

ActivationScales = Literal["shared", "temporal", "per_step"]
Temporal = Literal["blocks", "joint", "frozen", "full_precision"]


@dataclass(frozen=True)
class Config(Settings):
    """Settings; the defaults are those of TFMQ-DM's released LSUN recipe without its treatment of time.

    Attributes:
        steps, images: uniformly spaced steps of the pool, and images at each, for learning roundings and step sizes.
        range_steps, range_images: the same for activation ranges; None takes every step of the schedule.
        iterations, learning_rate, batch: of learning the roundings of each block.
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

    def __post_init__(self) -> None:
        check_choices(self)

    def recipe(self) -> Recipe:
        """See `Settings`."""
        rounding = RoundingConfig(self.iterations, self.batch, self.learning_rate)
        rows, memory = Spaced(self.steps, self.images), int(self.memory_gib * 2**30)
        passes: list[Pass] = []
        if self.split_shortcuts:
            passes.append(Grids(split_shortcuts=True))
        if self.temporal == "full_precision":
            passes.append(LeaveOut(("time_embedding", "time_projections")))
        if self.caching == "all":
            passes.append(TemporalCache("all"))
        passes.append(WeightRanges("search"))
        if self.temporal == "frozen":
            passes.append(FreezeTemporal())
        if self.temporal == "joint":
            passes.append(TemporalReconstruction(replace(rounding, iterations=self.temporal_iterations)))
        passes.append(BlockReconstruction(rounding, rows, memory_bytes=memory))
        if self.activation_scales == "temporal":
            passes.append(FiniteSetCalibration())
        ranges = Spaced(self.range_steps, self.range_images, shuffled=True)
        per_step = self.activation_scales == "per_step"
        passes.append(ActivationRanges(ranges, self.activation_range, self.momentum, self.range_batch, per_step))
        if self.activation_iterations:
            learning = StepSizeConfig(self.activation_iterations, self.batch, self.activation_learning_rate)
            passes.append(StepSizes(learning, rows, memory_bytes=memory))
        if self.caching in ("projection", "step"):
            passes.append(TemporalCache(self.caching))
        return tuple(passes)
