"""Tuning a quantised network end to end against the full-precision network's predictions.

Blocks that were learned one after another know nothing of what later ones do with their errors. Here the whole network
runs, and what quantisation leaves continuous learns by the error of the prediction: the scales of weights, the step
sizes of activations (LSQ, arXiv 1902.08153), biases and the parameters of norms. EfficientQAT (arXiv 2407.11062) has
such a second phase, for the scales of weights and on training data. Here calibration rows take the place of these data,
and full-precision predictions are the targets, as in EfficientDM (arXiv 2310.03270). Roundings can move too, by
straight-through gradients (arXiv 1308.3432).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from tqdm.auto import tqdm

from tfmq.cost import Shapes, restore_unrounded, run_through
from tfmq.live_bytes import FusedAttention, LiveBytes
from tfmq.modules.fake_quantize import FakeQuantize
from tfmq.modules.layers import QuantizedLayer
from tfmq.network.backbone import Network, evaluate
from tfmq.network.calibration import CalibrationSet, Draw, Spaced
from tfmq.network.rows import CalibrationRows
from tfmq.network.sampling import guides
from tfmq.passes import Cost, Memory, Pass
from tfmq.passes.reconstruction import ADAM_TENSORS, Losses, random_batches
from tfmq.plan import activation_quantizers, quantized_layers
from tfmq.precision import FULL
from tfmq.session import Session
from tfmq.settings import check_counts, check_numbers, check_positive
from tfmq.state import check_finished


@dataclass(frozen=True)
class NoiseDistillation(Pass[CalibrationRows]):
    """Tune a network that is quantised, all of it at once, by Adam; learning rates fall to 0 along a cosine.

    The loss of a row is the norm of its prediction's error, relative to that of the full-precision prediction. Under
    guidance, where both halves of each row are drawn, guided predictions are compared. What has a learning rate of 0
    stays as it is.

    Attributes:
        iterations: optimiser steps.
        batch: rows in each, both halves counted.
        scale_rate: learning rate of the scales of weights, relative to their size.
        step_size_rate: of the step sizes of activations, likewise.
        vector_rate: of biases and of the parameters of norms.
        rounding_rate: of the roundings of weights, in codes.
        norm: exponent of a row's loss.
        data: which rows of the pool.
        most_activation_bits: the pass does nothing where activations have more.
    """

    iterations: int = 200
    batch: int = 16
    scale_rate: float = 1e-3
    step_size_rate: float = 1e-3
    vector_rate: float = 1e-3
    rounding_rate: float = 0.0
    norm: float = 1.0
    data: Draw = Spaced(20, 128)
    most_activation_bits: int = FULL

    def __post_init__(self) -> None:
        check_counts(self, "iterations", "batch", "most_activation_bits")
        check_numbers(self, "scale_rate", "step_size_rate", "vector_rate", "rounding_rate", least=0)
        check_positive(self, "norm")
        if not (self.scale_rate or self.step_size_rate or self.vector_rate or self.rounding_rate):
            raise ValueError("all learning rates are 0, so that nothing learns: give at least one")

    def draw(self, pool: CalibrationSet, generator: torch.Generator) -> CalibrationRows:
        """See `Pass`."""
        return self.data(pool, generator)

    def run(self, session: Session, rows: CalibrationRows) -> None:
        """See `Pass`. Raises ValueError for a network that is not quantised yet, and a loss of NaN or infinity."""
        network = session.network
        check_finished(network, self.name)
        if session.precision.activation_bits > self.most_activation_bits:
            return
        layers, quantizers = quantized_layers(network), activation_quantizers(network)
        scale = session.pool.settings.guidance_scale
        guided = guides(session.full, scale) and is_both_halves(rows)

        def learn() -> list[float]:
            targets = predictions(session.full, rows, self.batch)
            return tune(network, rows, targets, scale if guided else None, self, session.generator)

        def learned() -> dict[str, Tensor]:
            found: dict[str, Tensor] = dict(vectors(network))
            for path, layer in layers.items():
                assert layer.codes is not None
                found |= {f"{path}.codes": layer.codes, f"{path}.weight_scale": layer.weight_scale}
            return found | {f"{path}.scale": quantizer.scale for path, quantizer in quantizers.items()}

        def restore(kept: dict[str, Tensor]) -> None:
            for name, vector in vectors(network).items():
                vector.data.copy_(kept[name])
            for path, layer in layers.items():
                layer.weight_scale.copy_(kept[f"{path}.weight_scale"])
                layer.load_codes(kept[f"{path}.codes"].to(layer.weight.device))
            for path, quantizer in quantizers.items():
                quantizer.scale = kept[f"{path}.scale"].to(quantizer.scale.device)

        session.learn("network", learn, learned, restore)
        session.count_evaluations(len(rows))

    def cost(self, shapes: Shapes, rows: CalibrationRows) -> Cost:
        """See `Pass`."""
        if shapes.precision.activation_bits > self.most_activation_bits:
            return Cost()
        return Cost(len(rows), self.iterations, self.iterations * min(self.batch, len(rows)))

    def memory(self, shapes: Shapes, rows: CalibrationRows) -> Memory:
        """See `Pass`."""
        if shapes.precision.activation_bits > self.most_activation_bits:
            return Memory()
        evaluated = shapes.evaluated(rows, self.batch, shapes.full)
        targets = sum(row.nbytes for row in rows.latents[:1]) * len(rows)
        return Memory(targets + max(evaluated, tuning_bytes(shapes, rows, self)))


class _Rounded(torch.autograd.Function):
    """Rounding, whose gradient is passed straight through."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        return grad


class TunedWeight(nn.Module):
    """A weight of codes whose scales learn: takes the place of a learned rounding in a layer until ``finish``.

    Attributes:
        growth: logarithm of what the scales are multiplied by, (output channels, groups).
        position: codes before they are rounded, where they move; else None.
    """

    position: nn.Parameter | None

    def __init__(self, layer: QuantizedLayer, moves: bool) -> None:
        super().__init__()
        assert layer.codes is not None
        self.growth = nn.Parameter(torch.zeros_like(layer.weight_scale))
        self.position = nn.Parameter(layer.codes.to(layer.weight_scale.dtype)) if moves else None
        # The layer holds this module, which must not hold the layer as its own.
        self.layer = [layer]

    def scale(self) -> Tensor:
        """The scales as they are now."""
        return self.layer[0].weight_scale * self.growth.exp()

    def forward(self) -> Tensor:
        """The weight; differentiable in both parameters."""
        layer = self.layer[0]
        if self.position is None:
            return layer.weight * layer.spread(self.growth.exp())
        codes = _Rounded.apply(self.position)
        return (codes - layer.spread(layer.weight_zero_point)) * layer.spread(self.scale())

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep codes that move on their grid."""
        if self.position is not None:
            self.position.clamp_(*self.layer[0].grid)

    @torch.no_grad()
    def finish(self) -> None:
        """Give the layer the weight of the codes and scales that were learned."""
        layer = self.layer[0]
        assert layer.codes is not None
        layer.rounding = None
        layer.weight_scale = self.scale()
        layer.load_codes(layer.codes if self.position is None else self.position.round().to(torch.uint8))


class Tuned:
    """What learns in a network, as parameters that begin where it is; ``finish`` folds them into it."""

    def __init__(self, network: Network, config: NoiseDistillation) -> None:
        self.weights: list[TunedWeight] = []
        self.step_sizes: list[tuple[FakeQuantize, Tensor, nn.Parameter]] = []
        self.vectors: list[nn.Parameter] = []
        if config.scale_rate or config.rounding_rate:
            for layer in quantized_layers(network).values():
                layer.rounding = TunedWeight(layer, config.rounding_rate > 0)
                self.weights.append(layer.rounding)
        if config.step_size_rate:
            for quantizer in activation_quantizers(network).values():
                growth = nn.Parameter(torch.zeros_like(quantizer.scale))
                self.step_sizes.append((quantizer, quantizer.scale, growth))
        if config.vector_rate:
            self.vectors = list(vectors(network).values())
            for vector in self.vectors:
                vector.requires_grad_()
        self.rates: list[tuple[float, list[nn.Parameter]]] = [
            (config.scale_rate, [weight.growth for weight in self.weights]),
            (config.rounding_rate, [weight.position for weight in self.weights if weight.position is not None]),
            (config.step_size_rate, [growth for _, _, growth in self.step_sizes]),
            (config.vector_rate, self.vectors),
        ]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that learns."""
        return [parameter for _, parameters in self.rates for parameter in parameters]

    def optimizer(self) -> torch.optim.Adam:
        """Adam with the learning rate of each kind."""
        groups = [{"params": parameters, "lr": rate} for rate, parameters in self.rates if parameters]
        return torch.optim.Adam(groups, fused=True)

    def place(self) -> None:
        """Let activations be quantised with the step sizes as they are now."""
        for quantizer, start, growth in self.step_sizes:
            quantizer.scale = start * growth.exp()

    def finish(self) -> None:
        """Let the network keep what was learned, as constants."""
        for weight in self.weights:
            weight.finish()
        for quantizer, start, growth in self.step_sizes:
            quantizer.scale = start * growth.detach().exp()
        for vector in self.vectors:
            vector.requires_grad_(False).grad = None


def vectors(network: Network) -> dict[str, nn.Parameter]:
    """The parameters of one dimension by name: biases, and scale and shift of norms."""
    return {name: parameter for name, parameter in network.named_parameters() if parameter.dim() == 1}


def is_both_halves(rows: CalibrationRows) -> bool:
    """Whether the second half of the rows are the inputs of the first, with other conditions: as guidance needs."""
    if len(rows) % 2:
        return False
    first, second = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    return torch.equal(first.latents, second.latents) and torch.equal(first.timesteps, second.timesteps)


@torch.no_grad()
def predictions(network: Network, rows: CalibrationRows, batch: int) -> Tensor:
    """What a network predicts for all rows, some at a time."""
    found = [
        evaluate(network, b.latents, b.timesteps.to(network.device), b.context, b.inputs) for b in rows.batches(batch)
    ]
    return torch.cat(found)


def guide(predicted: Tensor, scale: float) -> Tensor:
    """The guided prediction of rows whose first half are conditional, and whose second are not."""
    conditional, unconditional = predicted.chunk(2)
    return unconditional + scale * (conditional - unconditional)


def relative_error(found: Tensor, expected: Tensor, norm: float) -> Tensor:
    """The mean over rows of |found - expected|^norm / |expected|^norm, of Euclidean norms."""
    error, size = (each.flatten(1).norm(dim=1) for each in (found - expected, expected))
    return (error / size).pow(norm).mean()


def tune(
    network: Network,
    rows: CalibrationRows,
    targets: Tensor,
    guidance: float | None,
    config: NoiseDistillation,
    generator: torch.Generator,
) -> list[float]:
    """Tune ``network`` in place to predict ``targets`` for ``rows``; returns the losses.

    Under ``guidance``, a scale, rows are both halves of each pair, and the guided predictions are compared.
    """
    pairs, batch = len(rows), config.batch
    if guidance is not None:
        pairs, batch = len(rows) // 2, max(1, config.batch // 2)
        targets = guide(targets, guidance)
    tuned, losses = Tuned(network, config), Losses(advice="lower the learning rates")
    optimizer = tuned.optimizer()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=config.iterations)
    batches = random_batches(pairs, batch, config.iterations, generator)
    with torch.enable_grad():
        for index in tqdm(batches, desc=config.name, total=config.iterations, disable=None):
            part = rows[index if guidance is None else torch.cat([index, index + pairs])]
            tuned.place()
            found = evaluate(network, part.latents, part.timesteps.to(network.device), part.context, part.inputs)
            found = found if guidance is None else guide(found, guidance)
            loss = relative_error(found, targets[index], config.norm)
            losses.add(loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            for weight in tuned.weights:
                weight.clamp()
    trace = losses.read()
    tuned.finish()
    return trace


def tuning_bytes(shapes: Shapes, rows: CalibrationRows, config: NoiseDistillation) -> int:
    """What ``tune`` takes from the second iteration on, where gradients are kept until the next backward pass."""
    network, stream = shapes.network, shapes.stream(rows, config.batch)
    layers, quantizers = quantized_layers(network).values(), activation_quantizers(network).values()
    for layer in layers:
        layer.codes = torch.empty_like(layer.weight, dtype=torch.uint8)
    scales = [quantizer.scale for quantizer in quantizers]
    for quantizer in quantizers:
        quantizer.enabled = True
    with FusedAttention(), torch.enable_grad(), LiveBytes() as live:
        tuned = Tuned(network, config)
        parameters = tuned.parameters
        state = [torch.empty_like(parameter) for parameter in parameters for _ in range(ADAM_TENSORS)]
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        tuned.place()
        stream.time, stream.step = stream.time_inputs()
        found = run_through(stream)
        loss = relative_error(found, torch.empty_like(found), config.norm)
        for parameter in parameters:
            parameter.grad = None
        loss.backward()
    del state
    for parameter in parameters:
        parameter.grad = None
    for vector in tuned.vectors:
        vector.requires_grad_(False)
    for layer in layers:
        restore_unrounded(layer)
    for quantizer, scale in zip(quantizers, scales, strict=True):
        quantizer.scale, quantizer.enabled = scale, False
    return live.most
