"""The front door: quantise a diffusers UNet in place, after training."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from tqdm.auto import tqdm

from tfmq.journal import Effort
from tfmq.modules.fake_quantize import ActivationRange
from tfmq.network.calibration import CalibrationRows
from tfmq.network.unet import UNet, UNetLayout
from tfmq.passes.low_rank import LowRankConfig, add_branches
from tfmq.passes.reconstruction import RoundingConfig, StepSizeConfig, reconstruct_activations, reconstruct_weights
from tfmq.passes.temporal import Caching, cache_temporal_features, calibrate_finite_set, reconstruct_temporal
from tfmq.plan import (
    SHARED,
    Coverage,
    Protocol,
    activation_quantizers,
    check_unquantized,
    coverage,
    insert_quantizers,
    plan_for,
    quantized_layers,
)
from tfmq.precision import FULL, Precision
from tfmq.settings import check_choices, check_counts, check_numbers

ActivationScales = Literal["shared", "temporal", "per_step"]


@dataclass(frozen=True)
class QuantizationConfig:
    """What is done to the network, in this order; the methods are choices among these.

    Attributes:
        weight_range: ``minmax``; ``search`` for the smallest |w - w_hat|^2.4 among 80 ranges; ``thresholds`` for the
            same among PTQ4DM's 100 symmetric ones.
        weight_group: input channels that share a weight range in each output channel; None for all of them. Goes with
            dynamic activations.
        low_rank: smoothing and a low-rank branch in 16 bits at every layer (SVDQuant), or None.
        split_shortcuts: own ranges for the two halves of concatenated shortcuts (Q-Diffusion).
        freeze_temporal: round the layers that depend on the time step alone to nearest in their min-max ranges, before
            anything is learned.
        temporal: reconstruct the temporal information block on the finite set of steps (TFMQ-DM), or None.
        rounding: learn the roundings of the remaining layers block by block, or None for nearest rounding.
        symmetric_activations: signed grids with zero point 0.
        dynamic_activations: ranges computed at run time instead of calibrated; the settings of ranges, scales and step
            sizes below do not apply.
        activation_range: ``minmax``; ``search`` or ``thresholds`` for the searches of weight_range in each batch.
        activation_momentum: running average of ranges over batches; None keeps the widest range.
        activation_batch: most rows in one batch of range calibration, which are of one time step where scales are
            ``per_step``.
        activation_scales: ``shared``: one scale for all steps; ``temporal``: a table over steps in the temporal
            information block (finite-set calibration); ``per_step``: tables everywhere.
        step_sizes: learn activation step sizes block by block, or None.
        caching: which temporal features are looked up instead of computed, or None.
        batch: rows evaluated at once where nothing is learned.
        memory_bytes: most memory that calibration rows waiting between blocks may take. More wait where
            `tfmq.network.offload.waiting_in` says; without it they are refused.
    """

    weight_range: Literal["minmax", "search", "thresholds"] = "search"
    weight_group: int | None = None
    low_rank: LowRankConfig | None = None
    split_shortcuts: bool = False
    freeze_temporal: bool = False
    temporal: RoundingConfig | None = None
    rounding: RoundingConfig | None = None
    symmetric_activations: bool = False
    dynamic_activations: bool = False
    activation_range: ActivationRange = "minmax"
    activation_momentum: float | None = None
    activation_batch: int = 64
    activation_scales: ActivationScales = "shared"
    step_sizes: StepSizeConfig | None = None
    caching: Caching | None = None
    batch: int = 64
    memory_bytes: int = 8 * 2**30

    def __post_init__(self) -> None:
        check_choices(self)
        check_counts(self, "activation_batch", "batch", "memory_bytes")
        if self.weight_group is not None:
            check_counts(self, "weight_group")
        if self.activation_momentum is not None:
            check_numbers(self, "activation_momentum", least=0, most=1)


@dataclass
class QuantizationReport:
    """What a quantisation did: seconds by phase, effort, every layer's treatment, and what the method chose itself.

    Seconds include those of learning that was taken from a journal, so that a run that went on after a stop does not
    look faster than one that was never stopped.
    """

    seconds: dict[str, float] = field(default_factory=lambda: {"weights": 0.0, "activations": 0.0})
    effort: Effort = field(default_factory=Effort)
    coverage: list[Coverage] = field(default_factory=list)
    details: dict[str, object] = field(default_factory=dict)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        start, journaled = time.perf_counter(), self.effort.journaled_seconds
        yield
        self.seconds[phase] += time.perf_counter() - start + self.effort.journaled_seconds - journaled


def quantize_(
    unet: UNet,
    precision: Precision,
    config: QuantizationConfig,
    rows: CalibrationRows,
    activation_rows: CalibrationRows,
    timesteps: Tensor,
    generator: torch.Generator,
    protocol: Protocol = SHARED,
) -> QuantizationReport:
    """Quantise ``unet`` in place; it keeps working in any diffusers pipeline.

    A noise correction measured on it afterwards (PTQD, ``tfmq.passes.correction``) does not by itself: see
    ``corrected_scheduler``.

    Args:
        rows: calibration rows for low-rank branches and for learning roundings and step sizes; not looked at where
            there is none of these.
        activation_rows: calibration rows for activation ranges, in the order in which they are observed; where scales
            are ``per_step``, those of each time step among themselves.
        timesteps: int64 (T,), the steps of the schedule the network will be sampled with.
        generator: draws the batches; the same state gives the same network.
        protocol: which layers are quantised.

    Raises:
        ValueError: weights or activations hold NaN or infinity, activations are constant, the calibration rows are none
            or not the UNet's inputs or do not fit in ``config.memory_bytes``, or the UNet is quantised already or of a
            structure that is not supported. After this or any other error the UNet computes what it did before.
    """
    if precision.weight_bits == FULL:
        raise ValueError(f"precision {precision} leaves the weights in full precision: there is nothing to quantise")
    check_unquantized(unet)
    check_weights(unet)
    layout = UNetLayout.of(unet)
    calibrates = precision.quantizes_activations and not config.dynamic_activations
    if config.low_rank is not None or config.rounding is not None or (calibrates and config.step_sizes is not None):
        check_rows(unet, rows, "rows")
    if calibrates:
        check_rows(unet, activation_rows, "activation_rows")
    if not len(timesteps):
        raise ValueError("timesteps is empty: give those of the schedule, as in CalibrationSet.timesteps")
    unet.eval().requires_grad_(False)
    rows, activation_rows = rows.to(unet.device), activation_rows.to(unet.device)
    report = QuantizationReport()
    full = copy.deepcopy(unet)
    finite_set = timesteps.unique()
    plan = plan_for(
        unet,
        layout,
        precision,
        protocol,
        split_shortcuts=config.split_shortcuts,
        symmetric=config.symmetric_activations,
        dynamic=config.dynamic_activations,
        group=config.weight_group,
        rank=0 if config.low_rank is None else config.low_rank.rank,
    )
    if config.caching == "all":
        plan = replace(plan, layers={p: layer for p, layer in plan.layers.items() if p not in layout.temporal})
    with restored_on_failure(unet, full):
        insert_quantizers(unet, plan)
        if config.activation_scales != "shared" or config.caching is not None:
            unet.step_tracker.steps = finite_set.cpu()
        if config.caching == "all":
            report.details = cache_temporal_features(unet, full, layout, precision.activation_bits, config.caching)
        limits = {"batch": config.batch, "memory_bytes": config.memory_bytes}
        with report.timed("weights"):
            layers = quantized_layers(unet)
            if config.low_rank is not None:
                branched = {path: layer for path, layer in layers.items() if layer.rank}
                strengths = add_branches(full, branched, rows, config.low_rank, config.weight_range, config.batch)
                report.details = {"migration_strengths": strengths}
                report.effort.unet_evaluations += len(rows) + min(config.low_rank.search_rows, len(rows))
            for layer in tqdm(layers.values(), desc="weight ranges", disable=None):
                layer.find_weight_range(config.weight_range)
            temporal_layers = [layers[path] for path in layout.temporal if path in layers]
            if config.freeze_temporal:
                for layer in temporal_layers:
                    layer.find_weight_range("minmax")
                    layer.fold()
            if config.temporal is not None and temporal_layers:
                steps = finite_set.to(unet.device)
                reconstruct_temporal(unet, full, layout, steps, config.temporal, generator, report.effort)
            if config.rounding is not None:
                reconstruct_weights(unet, full, layout, rows, config.rounding, generator, report.effort, **limits)
            for layer in layers.values():
                if layer.codes is None:
                    layer.fold()
        if calibrates:
            with report.timed("activations"):
                calibrate_activations(unet, layout, activation_rows, config)
                report.effort.unet_evaluations += len(activation_rows)
                if config.step_sizes is not None:
                    learning = config.step_sizes
                    reconstruct_activations(unet, full, layout, rows, learning, generator, report.effort, **limits)
        if config.caching in ("projection", "step"):
            report.details = cache_temporal_features(unet, full, layout, precision.activation_bits, config.caching)
    report.coverage = coverage(unet)
    return report


@torch.no_grad()
def calibrate_activations(unet: UNet, layout: UNetLayout, rows: CalibrationRows, config: QuantizationConfig) -> None:
    """Observe ``rows`` in batches and freeze every activation quantiser.

    Scales per step take batches of one time step, so that a step's running range averages batches and not single rows.
    Inputs pass the observers unquantised; the tables of finite-set calibration come first and quantise already.
    """
    quantizers = activation_quantizers(unet)
    if config.activation_scales == "temporal":
        calibrate_finite_set(unet, layout)
        quantizers = {path: quantizer for path, quantizer in quantizers.items() if not quantizer.enabled}
    per_step = config.activation_scales == "per_step"
    for quantizer in quantizers.values():
        quantizer.observe(config.activation_momentum, per_step, config.activation_range)
    size = config.activation_batch
    batches = (rows.batches_of_steps if per_step else rows.batches)(size)
    counts = rows.timesteps.unique(return_counts=True)[1].tolist() if per_step else [len(rows)]
    total = sum(math.ceil(count / size) for count in counts)
    for batch in tqdm(batches, desc="activation ranges", total=total, disable=None):
        context = () if batch.context is None else (batch.context,)
        unet(batch.latents, batch.timesteps.to(unet.device), *context)
    for quantizer in quantizers.values():
        quantizer.freeze()


def check_weights(unet: UNet) -> None:
    """Raise ValueError naming the first parameter that holds NaN or infinity."""
    for name, parameter in unet.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(f"{name} holds NaN or infinity: the checkpoint is damaged, fetch or convert it again")


def check_rows(unet: UNet, rows: CalibrationRows, name: str) -> None:
    """Raise ValueError for calibration rows that are none, or no inputs of ``unet``; ``name`` is theirs in errors."""
    if not len(rows):
        raise ValueError(f"{name} holds no calibration row: draw at least one, for example by CalibrationSet.spaced")
    channels = unet.config.in_channels
    if rows.latents.dim() != 4 or rows.latents.shape[1] != channels:
        raise ValueError(
            f"{name}.latents is of shape {tuple(rows.latents.shape)}: the UNet takes {channels} channels, "
            f"(rows, {channels}, height, width)"
        )
    takes_context = isinstance(unet, UNet2DConditionModel)
    if takes_context != (rows.context is not None):
        does = "takes a context" if takes_context else "takes none"
        has = "no context" if takes_context else "a context"
        raise ValueError(f"{name} has {has}, and a {type(unet).__name__} {does}: draw them from a pool of this UNet")


@contextmanager
def restored_on_failure(unet: UNet, full: UNet) -> Iterator[None]:
    """Make ``unet`` the full-precision ``full`` again, in place, where anything is raised inside."""
    try:
        yield
    except BaseException:
        vars(unet).clear()
        vars(unet).update(vars(full))
        raise
