"""TDQ, quantisation-aware training (So et al., NeurIPS 2023, arXiv 2306.02316), without training data.

All weights, their step sizes (LSQ: one for each output channel, signed codes) and the networks that predict the step
sizes of activations are trained jointly on the diffusion loss, the squared error of the predicted noise, with AdamW.
The data are the full-precision samples of the calibration pool, noised anew at steps drawn uniformly from those of the
schedule: the model's own images, drawn with guidance where it is used; the paper takes its training set. At the end
weights are folded into codes and the networks' outputs tabulated, as in `tdq`. Biases and norms are trained too and
stay in full precision. One training row counts as one evaluation of the UNet, though its backward pass costs two more.
The loss is about samples, not about full precision: the network may leave the full-precision one's predictions while
its loss falls below it.

Where the released code and the paper differ, what they leave open, and what is done here:

- The released code trains at all 1,000 steps for 200,000 iterations; here at the steps that are sampled. Learning
  rates, groups and weight decay are as released; its squared error for CIFAR-10 is taken (absolute for churches).
- It starts from the averaged (EMA) weights of the checkpoint; a checkpoint here has one set, and none is averaged.
- Networks start at the static step size, as released, if ``fit_iterations`` is 0; a short training has to start
  where `tdq` ends, with networks fitted to the local quantisation error.
- The learning rate falls to 0 along a cosine after the warm-up, where the released one stays; dropout is left out.
- The weights' step sizes start where the error of the weight is smallest, the released ones at a statistic.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from baselines import Method, _tdq
from tfmq.effort import PlannedEffort
from tfmq.network.calibration import CalibrationSet
from tfmq.network.unet import UNet
from tfmq.passes.step_network import tabulate
from tfmq.passes.training import TrainingConfig, train
from tfmq.plan import Protocol, activation_quantizers, coverage
from tfmq.precision import Precision
from tfmq.quantization import QuantizationReport


@dataclass(frozen=True)
class Config(_tdq.Config):
    """Settings; those of the training are the released ones for LSUN Churches.

    Attributes:
        iterations, batch: of the training.
        learning_rate: of weights, biases and norms; a tenth of it for the weights' step sizes.
        network_learning_rate: of the networks.
        warmup: part of the iterations in which the learning rates rise.
    """

    fit_iterations: int = 0
    iterations: int = 200_000
    batch: int = 32
    learning_rate: float = 5e-5
    network_learning_rate: float = 5e-5
    warmup: float = 0.025

    def effort(self, unet: UNet, pool: CalibrationSet, precision: Precision, protocol: Protocol) -> PlannedEffort:
        """See `Settings`."""
        fitting = super().effort(unet, pool, precision, protocol)
        trained = self.iterations * self.batch
        steps = fitting.optimizer_steps + self.iterations
        return replace(fitting, weight_evaluations=trained, optimizer_steps=steps, learned_rows=trained)

    def memory(self, unet: UNet, pool: CalibrationSet, precision: Precision, protocol: Protocol) -> None:
        """Not known: the whole network is trained at once."""
        return None


def quantize(
    unet: UNet,
    pool: CalibrationSet,
    precision: Precision,
    config: Config,
    generator: torch.Generator,
    protocol: Protocol,
) -> QuantizationReport:
    """Quantise ``unet`` in place."""
    report = QuantizationReport()
    _tdq.prepare(unet, pool, precision, protocol)
    with report.timed("activations"):
        networks = _tdq.fitted_networks(unet, pool, config, generator, report)
    training = TrainingConfig(
        iterations=config.iterations,
        batch=config.batch,
        learning_rate=config.learning_rate,
        network_learning_rate=config.network_learning_rate,
        weight_decay=config.weight_decay,
        warmup=config.warmup,
    )
    with report.timed("weights"):
        train(unet, networks, pool, training, generator)
        tabulate(networks, activation_quantizers(unet), unet.time_proj(unet.step_tracker.steps.to(unet.device)))
    report.effort.unet_evaluations += config.iterations * config.batch
    report.effort.optimizer_steps += config.iterations
    report.coverage = coverage(unet)
    return report


METHOD = Method("TDQ (training)", "arXiv 2306.02316", Config, quantize, _tdq.objection, _tdq.PUBLISHED)
