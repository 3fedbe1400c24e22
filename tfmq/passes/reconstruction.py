"""Learning roundings and step sizes so that a part of the network reproduces its full-precision output.

There is one loop for roundings and one for step sizes. Passes call them with a loss of their own, for a single layer, a
block, or the temporal information block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tfmq.cost import restore_unrounded
from tfmq.live_bytes import LiveBytes
from tfmq.modules.fake_quantize import FakeQuantize
from tfmq.modules.layers import QuantizedLayer
from tfmq.network.backbone import Backbone, Block, Network
from tfmq.network.offload import BlockStream
from tfmq.network.rows import CalibrationRows
from tfmq.numerics.rounding import AdaRound, annealed_beta
from tfmq.plan import activation_quantizers
from tfmq.session import Session
from tfmq.settings import check_counts, check_numbers, check_positive


@dataclass(frozen=True)
class RoundingConfig:
    """Settings of learned rounding (AdaRound); the defaults are those of BRECQ, Q-Diffusion and TFMQ-DM.

    Attributes:
        iterations: optimiser steps for each unit that is learned.
        batch: rows in each.
        learning_rate: of Adam.
        regularizer_weight: of the term that draws roundings to 0 or 1.
        warmup: share of the iterations before that term sets in.
        norm: exponent of the reconstruction loss.
    """

    iterations: int = 20_000
    batch: int = 32
    learning_rate: float = 1e-3
    regularizer_weight: float = 0.01
    warmup: float = 0.2
    norm: float = 2.0

    def __post_init__(self) -> None:
        check_counts(self, "iterations", "batch")
        check_positive(self, "learning_rate", "norm")
        check_numbers(self, "regularizer_weight", least=0)
        check_numbers(self, "warmup", least=0, most=1)


@dataclass(frozen=True)
class StepSizeConfig:
    """Settings of learned step sizes of activations; the defaults are Q-Diffusion's.

    Attributes:
        iterations: optimiser steps for each unit that is learned.
        batch: rows in each.
        learning_rate: of Adam, annealed to 0 along a cosine.
        norm: exponent of the reconstruction loss.
    """

    iterations: int = 5_000
    batch: int = 32
    learning_rate: float = 4e-4
    norm: float = 2.4

    def __post_init__(self) -> None:
        check_counts(self, "iterations", "batch")
        check_positive(self, "learning_rate", "norm")


Loss = Callable[[Tensor], Tensor]
# Losses that a GPU computes before the host, which waits for what it reads, looks at them.
READ_TOGETHER = 50
# What the loss of a reconstruction is called; NaN or infinity would round every weight to one side.
RECONSTRUCTION = "the reconstruction loss", "lower the learning rate, or check the batch size"
# What Adam keeps of each parameter: running means of its gradient and of the square.
ADAM_TENSORS = 2


def reconstruction_loss(prediction: Tensor, target: Tensor, norm: float) -> Tensor:
    """|prediction - target|^norm summed over dimension 1 and averaged over the others, as in BRECQ's released code."""
    return (prediction - target).abs().pow(norm).sum(1).mean()


class Losses:
    """The losses of a loop, as numbers, checked: each at once on a CPU, some at a time on a GPU.

    Args:
        what: they are called.
        advice: what to do where one is NaN or infinite.
    """

    def __init__(self, what: str = "the loss", advice: str = "lower the learning rate") -> None:
        self.what, self.advice = what, advice
        self.values: list[float] = []
        self._unread: list[Tensor] = []

    def add(self, loss: Tensor) -> None:
        """Take the next one in. Raises ValueError if it, or one that was not read yet, is NaN or infinite."""
        self._unread.append(loss.detach())
        if loss.device.type == "cpu" or len(self._unread) == READ_TOGETHER:
            self.read()

    def read(self) -> list[float]:
        """All losses so far. Raises ValueError as `add` does."""
        for value in torch.stack(self._unread).tolist() if self._unread else ():
            if not math.isfinite(value):
                raise ValueError(f"{self.what} is {value} at iteration {len(self.values)}: {self.advice}")
            self.values.append(value)
        self._unread.clear()
        return self.values


def loss_against(targets: Tensor, predict: Callable[[Tensor], Tensor], norm: float) -> Loss:
    """The reconstruction loss of ``predict(row indices)`` against the same rows of ``targets``."""

    def loss(index: Tensor) -> Tensor:
        prediction = predict(index)
        return reconstruction_loss(prediction, targets[index].to(prediction.device), norm)

    return loss


def on_rows(layer: nn.Module, inputs: Tensor) -> Callable[[Tensor], Tensor]:
    """What ``layer`` puts out for the rows of ``inputs`` at given indices."""
    return lambda index: layer(inputs[index])


def random_batches(rows: int, batch: int, iterations: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Row indices of each iteration's batch, drawn without repetition within a batch."""
    for _ in range(iterations):
        yield torch.randperm(rows, generator=generator)[:batch]


def learn_rounding(
    layers: Sequence[QuantizedLayer], loss: Loss, batches: Iterator[Tensor], config: RoundingConfig
) -> list[float]:
    """Learn the rounding of ``layers`` on ``loss(row indices)``, then fold them; returns the loss at each iteration."""
    roundings = [layer.learn_rounding() for layer in layers]
    optimizer = torch.optim.Adam([rounding.alpha for rounding in roundings], lr=config.learning_rate, fused=True)
    losses = Losses(*RECONSTRUCTION)
    with torch.enable_grad():
        for iteration, rows in enumerate(batches, 1):
            value = loss(rows)
            losses.add(value)
            optimizer.zero_grad()
            value.backward()
            beta = annealed_beta(iteration, config.iterations, config.warmup)
            if beta is not None:
                for rounding in roundings:
                    rounding.add_penalty_gradient(config.regularizer_weight, beta)
            optimizer.step()
    trace = losses.read()
    for layer in layers:
        layer.fold()
    return trace


def learn_step_sizes(
    quantizers: Sequence[FakeQuantize], loss: Loss, batches: Iterator[Tensor], config: StepSizeConfig
) -> list[float]:
    """Learn the scales of ``quantizers`` (zero points stay) on ``loss(row indices)``, cosine-annealed to 0.

    A scale that the optimiser would take to 0 or below ends at its start.
    """
    starts = [quantizer.scale for quantizer in quantizers]
    for quantizer in quantizers:
        quantizer.scale = quantizer.scale.clone().requires_grad_()
    optimizer = torch.optim.Adam([quantizer.scale for quantizer in quantizers], lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=config.iterations, eta_min=0.0)
    losses = Losses(*RECONSTRUCTION)
    with torch.enable_grad():
        for rows in batches:
            value = loss(rows)
            losses.add(value)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
    trace = losses.read()
    for quantizer, start in zip(quantizers, starts, strict=True):
        learned = quantizer.scale.detach()
        quantizer.scale = torch.where(learned > 0, learned, start)
    return trace


def learn_roundings(
    session: Session, unit: str, layers: Mapping[str, QuantizedLayer], loss: Loss, rows: int, config: RoundingConfig
) -> None:
    """Learn the rounding of ``layers`` as one unit, on random batches of so many ``rows``, and fold them."""

    def learn() -> list[float]:
        batches = random_batches(rows, config.batch, config.iterations, session.generator)
        return learn_rounding(list(layers.values()), loss, batches, config)

    def learned() -> dict[str, Tensor]:
        return {path: layer.codes for path, layer in layers.items() if layer.codes is not None}

    def restore(codes: dict[str, Tensor]) -> None:
        for path, layer in layers.items():
            layer.load_codes(codes[path].to(layer.weight.device))

    session.learn(unit, learn, learned, restore)


def learn_scales(
    session: Session, unit: str, quantizers: Mapping[str, FakeQuantize], loss: Loss, rows: int, config: StepSizeConfig
) -> None:
    """Learn the scales of ``quantizers`` as one unit, on random batches of so many ``rows``."""

    def learn() -> list[float]:
        batches = random_batches(rows, config.batch, config.iterations, session.generator)
        return learn_step_sizes(list(quantizers.values()), loss, batches, config)

    def learned() -> dict[str, Tensor]:
        return {path: quantizer.scale for path, quantizer in quantizers.items()}

    def restore(scales: dict[str, Tensor]) -> None:
        for path, quantizer in quantizers.items():
            quantizer.scale = scales[path].to(quantizer.scale.device)

    session.learn(unit, learn, learned, restore)


@torch.no_grad()
def time_layer_data(
    backbone: Backbone, network: Network, full: Network, path: str, rows: CalibrationRows
) -> tuple[Tensor, Tensor]:
    """Inputs (S, D_in) of a layer of ``backbone.embedding`` in ``network``, and outputs (S, D_out) in ``full``.

    There is one for each time step of ``rows``; of a layer that depends on conditions too, one for each row.
    """
    seen: dict[str, Tensor] = {}
    hooks = [
        network.get_submodule(path).register_forward_pre_hook(lambda module, args: seen.update(inputs=args[0])),
        full.get_submodule(path).register_forward_hook(lambda module, args, output: seen.update(targets=output)),
    ]
    try:
        for each in (network, full):
            if path in backbone.condition_embedding:
                backbone.time_input(each, rows.timesteps.to(each.device), rows.inputs)
            else:
                backbone.temporal_features(each, rows.timesteps.unique().to(each.device))
    finally:
        for hook in hooks:
            hook.remove()
    return seen["inputs"], seen["targets"]


def rounding_bytes(layers: Sequence[QuantizedLayer], loss: Callable[[], Tensor]) -> int:
    """Bytes that learning the roundings of layers on the meta device takes, from the second iteration on."""

    def start() -> list[nn.Parameter]:
        roundings.extend(layer.learn_rounding() for layer in layers)
        return [rounding.alpha for rounding in roundings]

    def finish() -> None:
        for rounding in roundings:
            rounding.add_penalty_gradient(1.0, 2.0)

    roundings: list[AdaRound] = []
    return iteration_bytes(layers, start, ADAM_TENSORS, loss, finish)


def iteration_bytes(
    layers: Sequence[QuantizedLayer],
    start: Callable[[], Sequence[nn.Parameter]],
    copies: int,
    loss: Callable[[], Tensor],
    finish: Callable[[], None],
) -> int:
    """Bytes that an iteration on layers on the meta device takes, from the second one on.

    ``start`` lets the layers learn and gives their parameters, of each of which ``copies`` tensors are kept; ``finish``
    comes after the backward pass.
    """
    with torch.enable_grad(), LiveBytes() as live:
        parameters = start()
        kept = [torch.empty_like(parameter) for parameter in parameters for _ in range(copies)]
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        value = loss()
        for parameter in parameters:
            parameter.grad = None
        value.backward()
        finish()
    del kept
    for layer in layers:
        restore_unrounded(layer)
    return live.most


def step_size_bytes(paths: Collection[str], stream: BlockStream, block: Block) -> int:
    """Bytes that learning the step sizes of a block's layers and attentions at ``paths`` takes."""
    below = tuple(f"{path}." for path in paths)
    found = activation_quantizers(stream.network)
    quantizers = [q for path, q in found.items() if block.holds(path) and path.startswith(below)]
    if not quantizers:
        return 0
    with torch.enable_grad(), LiveBytes() as live:
        for quantizer in quantizers:
            quantizer.scale, quantizer.enabled = quantizer.scale.clone().requires_grad_(), True
        block_loss(stream, block).backward()
    for quantizer in quantizers:
        quantizer.scale, quantizer.enabled = quantizer.scale.detach(), False
    return live.most


def block_loss(stream: BlockStream, block: Block) -> Tensor:
    """The loss of a block on a batch of all rows of a stream, against targets on the meta device."""
    output = stream.evaluate(stream.network, block, stream.inputs(block), torch.arange(len(stream.rows)))
    return reconstruction_loss(output, torch.empty_like(output), 2.0)
