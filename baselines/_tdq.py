"""What TDQ's two rows share: its grids, its draw of calibration rows, its networks and how they are fitted."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from baselines import Arguments, Settings
from tfmq.effort import PlannedEffort
from tfmq.network.calibration import CalibrationSet
from tfmq.network.unet import UNet, UNetLayout
from tfmq.passes.step_network import FitConfig, StepNetworks, fit_networks, sample_activations, with_silu_grids
from tfmq.plan import Protocol, activation_quantizers, insert_quantizers, plan_for
from tfmq.precision import Precision
from tfmq.quantization import QuantizationConfig, QuantizationReport, check_weights

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

    def arguments(self, pool: CalibrationSet, protocol: Protocol, generator: torch.Generator) -> Arguments:
        """See `Settings`; what evaluates the rows is not `quantize_`, but takes no more."""
        rows = pool.normal(self.rows, self.mean, self.deviation, generator)
        return QuantizationConfig(activation_batch=self.forward_batch), rows, rows, protocol

    def effort(self, unet: UNet, pool: CalibrationSet, precision: Precision, protocol: Protocol) -> PlannedEffort:
        """See `Settings`; the networks are fitted to what is kept of one pass, without the UNet."""
        return replace(super().effort(unet, pool, precision, protocol), optimizer_steps=self.fit_iterations)


def prepare(unet: UNet, pool: CalibrationSet, precision: Precision, protocol: Protocol) -> None:
    """Put the quantisers in place, with TDQ's grids, for the steps of the pool."""
    check_weights(unet)
    layout = UNetLayout.of(unet)
    unet.eval().requires_grad_(False)
    insert_quantizers(unet, with_silu_grids(plan_for(unet, layout, precision, protocol), unet, layout))
    unet.step_tracker.steps = pool.timesteps.unique()


def fitted_networks(
    unet: UNet, pool: CalibrationSet, config: Config, generator: torch.Generator, report: QuantizationReport
) -> StepNetworks:
    """The network of each quantiser, fitted to its input on calibration rows."""
    quantizers = activation_quantizers(unet)
    rows = pool.normal(config.rows, config.mean, config.deviation, generator).to(unet.device)
    samples = sample_activations(unet, rows, config.values, config.forward_batch, generator)
    networks = StepNetworks(samples.initial_steps(quantizers), unet.time_proj.num_channels, generator)
    fit = FitConfig(config.fit_iterations, config.fit_batch, config.fit_learning_rate, config.weight_decay)
    fit_networks(networks, quantizers, samples, unet.time_proj, fit, generator)
    report.effort.unet_evaluations += len(rows)
    report.effort.optimizer_steps += config.fit_iterations
    return networks


def objection(precision: Precision) -> str:
    """TDQ needs quantised activations."""
    if precision.quantizes_activations:
        return ""
    return "TDQ predicts step sizes of activations: without quantised activations nothing of it is left"
