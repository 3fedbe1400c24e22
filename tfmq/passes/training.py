"""Quantisation-aware training: weights, their step sizes and those of activations, all learned on the diffusion loss.

Weights follow LSQ (Esser et al. 2020, arXiv 1902.08153): one step size for each output channel, signed codes, gradients
through rounding by the straight-through rule. Activation step sizes come from the networks of `step_network`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from tfmq.cost import Shapes, restore_unrounded, run_through
from tfmq.live_bytes import FusedAttention, LiveBytes
from tfmq.modules.layers import QuantizedLayer
from tfmq.network.backbone import Backbone, Network, evaluate
from tfmq.network.calibration import CalibrationSet
from tfmq.network.rows import CalibrationRows
from tfmq.numerics.affine import SMALLEST_SCALE, Grid, fake_quantize, quantize
from tfmq.numerics.observer import search
from tfmq.passes import Cost, Memory, Pass
from tfmq.passes.predicted_step_sizes import PredictedStepSizes
from tfmq.passes.reconstruction import ADAM_TENSORS, Losses
from tfmq.passes.step_network import StepNetworks, set_tables
from tfmq.plan import QuantizationPlan, activation_quantizers, quantized_layers
from tfmq.session import Session
from tfmq.settings import check_counts, check_numbers, check_positive

GUIDANCE_DROPOUT = 0.1


class LearnedStepWeight(nn.Module):
    """LSQ for one weight: takes the place of a learned rounding in a layer until ``finish`` folds it.

    The step sizes start where the error of the weight is smallest; their gradient is multiplied by 1 / sqrt(n N), with
    n = 2^bits - 1 levels and N weights sharing a step.

    Attributes:
        scale: step sizes, of a shape that broadcasts against the weight.
    """

    def __init__(self, weight: Tensor, bits: int) -> None:
        super().__init__()
        self.weight = weight
        self.grid = Grid.signed(bits)
        with torch.no_grad():
            scale, _ = search(weight.flatten(1), bits, symmetric=True)
        self.scale = nn.Parameter(scale.view(-1, *[1] * (weight.dim() - 1)))
        self.gradient_scale = 1 / math.sqrt((2**bits - 1) * weight[0].numel())
        self.scale.register_hook(lambda gradient: gradient * self.gradient_scale)

    def forward(self) -> Tensor:
        """The quantised weight; differentiable in weight and scale."""
        scale = self.scale.clamp_min(SMALLEST_SCALE)
        return fake_quantize(self.weight, scale, torch.zeros((), device=scale.device), self.grid)

    @torch.no_grad()
    def finish(self, layer: QuantizedLayer) -> None:
        """Fold the weight of ``layer`` into codes: unsigned, with the zero point in the middle."""
        layer.rounding = None
        layer.weight_scale = self.scale.detach().clamp_min(SMALLEST_SCALE).flatten(1)
        layer.weight_zero_point = torch.full_like(layer.weight_scale, -self.grid.qmin)
        codes = quantize(self.weight, self.scale.clamp_min(SMALLEST_SCALE), -self.grid.qmin, layer.grid)
        layer.load_codes(codes.to(torch.uint8))


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of the training, by AdamW.

    Attributes:
        iterations: optimiser steps.
        batch: samples in each.
        learning_rate: of weights, biases and norms; a tenth of it for the weights' step sizes.
        network_learning_rate: of the step networks.
        weight_decay: of all but the weights' step sizes, which have none.
        warmup: share of the iterations over which the rates rise linearly; then they fall to 0 along a cosine.
    """

    iterations: int = 200_000
    batch: int = 32
    learning_rate: float = 5e-5
    network_learning_rate: float = 5e-5
    weight_decay: float = 0.01
    warmup: float = 0.025

    def __post_init__(self) -> None:
        check_counts(self, "iterations", "batch")
        check_positive(self, "learning_rate", "network_learning_rate")
        check_numbers(self, "weight_decay", least=0)
        check_numbers(self, "warmup", least=0, most=1)


@dataclass(frozen=True)
class QuantizationAwareTraining(Pass[CalibrationRows]):
    """Train weights, their step sizes and the networks that predict those of activations, jointly.

    Attributes:
        training: settings of the training.
        step_sizes: how the networks are fitted before the training; no earlier pass has to quantise anything.
    """

    training: TrainingConfig = TrainingConfig()
    step_sizes: PredictedStepSizes = PredictedStepSizes()

    def amend(self, plan: QuantizationPlan, network: Network, backbone: Backbone) -> QuantizationPlan:
        """See `Pass`."""
        return self.step_sizes.amend(plan, network, backbone)

    def draw(self, pool: CalibrationSet, generator: torch.Generator) -> CalibrationRows:
        """See `Pass`. Raises ValueError for a pool that was recorded with a ControlNet."""
        if pool.residuals:
            raise ValueError(
                "the pool was recorded with a ControlNet, whose residuals follow the latents, and training adds "
                "noise of its own: "
                "record it without, or take a recipe without training"
            )
        return self.step_sizes.draw(pool, generator)

    def run(self, session: Session, rows: CalibrationRows) -> None:
        """See `Pass`. One training row counts as one evaluation, though its backward pass costs two more."""
        networks = self.step_sizes.fitted(session, rows)
        encode = partial(session.backbone.encoding, session.network)
        trace = train(session.network, networks, encode, session.pool, self.training, session.generator)
        self.step_sizes.tabulate(session, networks)
        session.count_evaluations(len(trace) * self.training.batch)
        session.count_steps(len(trace))

    def cost(self, shapes: Shapes, rows: CalibrationRows) -> Cost:
        """See `Pass`."""
        iterations = self.training.iterations
        trained = iterations * self.training.batch
        shapes.rounded |= shapes.unrounded
        return self.step_sizes.cost(shapes, rows) + Cost(trained, iterations, trained)

    def memory(self, shapes: Shapes, rows: CalibrationRows) -> Memory:
        """See `Pass`."""
        fitted, trained = self.step_sizes.memory(shapes, rows), training_bytes(shapes, self.training.batch)
        return Memory(max(fitted.held, trained))


def train(
    network: Network,
    networks: StepNetworks,
    encode: Callable[[Tensor], Tensor],
    pool: CalibrationSet,
    config: TrainingConfig,
    generator: torch.Generator,
) -> list[float]:
    """Train ``network``, its quantisers in place, on noise added to ``pool.samples``; returns the losses.

    The target is what the network predicts: that noise, or v or the clean sample.

    Time steps are drawn uniformly from the schedule, a repeated one as often. All parameters learn, those of layers
    in full precision too. At the end weights are folded; the networks are left to the caller to tabulate.

    Raises ValueError if the loss becomes NaN or infinite.
    """
    network.requires_grad_(True)
    layers, quantizers = quantized_layers(network), activation_quantizers(network)
    parameters = list(network.parameters())
    learned = {}
    for path, layer in layers.items():
        learned[path] = layer.rounding = LearnedStepWeight(layer.weight, layer.weight_bits)
    groups = [
        {"params": parameters, "lr": config.learning_rate},
        {"params": list(networks.parameters()), "lr": config.network_learning_rate},
        {"params": [part.scale for part in learned.values()], "lr": config.learning_rate / 10, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda iteration: _rate(iteration, config))
    device = network.device
    encodings = encode(network.step_tracker.steps.to(device))
    losses = Losses("the training loss")
    with torch.enable_grad():
        for _ in tqdm(range(config.iterations), desc="training", disable=None):
            rows, target = noised(pool, config.batch, generator)
            rows, target = rows.to(device), target.to(device)
            set_tables(quantizers, networks(encodings))
            predicted = evaluate(network, rows.latents, rows.timesteps.to(device), rows.context, rows.inputs)
            loss = F.mse_loss(predicted, target)
            losses.add(loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    trace = losses.read()
    optimizer.zero_grad()
    network.requires_grad_(False)
    for path, layer in layers.items():
        learned[path].finish(layer)
    return trace


def training_bytes(shapes: Shapes, batch: int) -> int:
    """What ``train`` takes from the second iteration on, where gradients are kept until the next backward pass."""
    network, pool, device = shapes.network, shapes.pool, shapes.network.device
    layers, quantizers = quantized_layers(network), activation_quantizers(network)
    timesteps = pool.timesteps.unique()
    rows = pool.rows(torch.arange(batch) % pool.steps, torch.arange(batch) % pool.images)[:batch]
    network.step_tracker.steps = timesteps
    for layer in layers.values():
        layer.rounding = LearnedStepWeight(layer.weight, layer.weight_bits)
    with FusedAttention(), torch.enable_grad(), LiveBytes() as live:
        encodings = shapes.backbone.encoding(network, timesteps.to(device))
        networks = StepNetworks(torch.empty(len(quantizers), device=device), encodings.shape[1], torch.Generator())
        network.requires_grad_(True)
        parameters = [*network.parameters(), *networks.parameters()]
        state = [torch.empty_like(parameter) for parameter in parameters for _ in range(ADAM_TENSORS)]
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        set_tables(quantizers, networks(encodings))
        stream = shapes.stream(rows, batch)
        stream.time, stream.step = stream.time_inputs()
        predicted = run_through(stream)
        loss = F.mse_loss(predicted, torch.empty_like(predicted))
        for parameter in parameters:
            parameter.grad = None
        loss.backward()
    del state
    for parameter in network.parameters():
        parameter.grad = None
    network.requires_grad_(False)
    for layer in layers.values():
        restore_unrounded(layer)
    for quantizer in quantizers.values():
        quantizer.scale, quantizer.enabled = quantizer.scale.detach(), False
    return live.most


def _rate(iteration: int, config: TrainingConfig) -> float:
    warmup = config.warmup * config.iterations
    if iteration < warmup:
        return (iteration + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (iteration - warmup) / max(config.iterations - warmup, 1)))


def noised(pool: CalibrationSet, batch: int, generator: torch.Generator) -> tuple[CalibrationRows, Tensor]:
    """Samples of the pool with noise added, x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e at steps t of the pool; the target.

    The target is e, or what else the network predicts (``CalibrationSet.predicts``). Where the pool has an
    unconditional context, it takes the place of one in ten rows' own, as guidance is trained.
    """
    image = torch.randint(pool.images, (batch,), generator=generator)
    step = torch.randint(pool.steps, (batch,), generator=generator)
    clean = pool.samples[image]
    noise = torch.randn(clean.shape, generator=generator).to(clean.device)
    alpha = pool.alphas[step].to(clean).view(-1, *[1] * (clean.dim() - 1))
    latents = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
    context = None if pool.context is None else pool.context[image]
    inputs = {name: value[image] for name, value in pool.inputs.items()}
    if context is not None and pool.unconditional is not None:
        dropped = torch.rand(batch, generator=generator) < GUIDANCE_DROPOUT
        context = torch.where(_beside(dropped, context), pool.unconditional[image], context)
        for name, value in pool.unconditional_inputs.items():
            inputs[name] = torch.where(_beside(dropped, inputs[name]), value[image], inputs[name])
    target = noise
    if pool.predicts is not None:
        of_clean, of_noise = pool.predicts[step].to(clean).T.view(2, -1, *[1] * (clean.dim() - 1))
        target = of_clean * clean + of_noise * noise
    return CalibrationRows(latents, pool.timesteps[step], context, inputs), target


def _beside(dropped: Tensor, context: Tensor) -> Tensor:
    """Booleans (B,) in a shape that broadcasts against a context (B, ...)."""
    return dropped.to(context.device).view(-1, *[1] * (context.dim() - 1))
