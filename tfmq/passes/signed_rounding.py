"""Learning roundings and ranges of weights by signed gradient descent (AutoRound, Cheng et al. 2023, arXiv 2309.05516).

As in `block_reconstruction`, inputs come from the network quantised so far, targets from full precision, and
activations are not quantised.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tfmq.modules.layers import QuantizedLayer
from tfmq.numerics.signed_rounding import AutoRound
from tfmq.passes.block_reconstruction import BlockwiseRounding
from tfmq.passes.reconstruction import RECONSTRUCTION, Loss, Losses, iteration_bytes, random_batches
from tfmq.session import Session
from tfmq.settings import check_counts, check_positive

PARTS = ("codes", "weight_scale", "weight_zero_point")


@dataclass(frozen=True)
class SignedRoundingConfig:
    """Settings of learning by signs; the defaults are the paper's.

    Attributes:
        iterations: steps for each unit that is learned.
        batch: rows in each.
        learning_rate: of the first step, from where it falls linearly to 0; None for 1 / iterations.
        norm: exponent of the reconstruction loss.
    """

    iterations: int = 200
    batch: int = 8
    learning_rate: float | None = None
    norm: float = 2.0

    def __post_init__(self) -> None:
        check_counts(self, "iterations", "batch")
        check_positive(self, "norm", *(() if self.learning_rate is None else ("learning_rate",)))

    def rate(self, iteration: int) -> float:
        """The learning rate at ``iteration``, counted from 0."""
        first = 1 / self.iterations if self.learning_rate is None else self.learning_rate
        return first * (1 - iteration / self.iterations)


@dataclass(frozen=True)
class SignedRounding(BlockwiseRounding):
    """Learn the roundings and ranges of all layers that no earlier pass has rounded; they need no range before."""

    rounding: SignedRoundingConfig = SignedRoundingConfig()

    def learn(self, session: Session, unit: str, layers: Mapping[str, QuantizedLayer], loss: Loss, rows: int) -> None:
        """See `BlockwiseRounding`."""

        def learn() -> list[float]:
            batches = random_batches(rows, self.rounding.batch, self.rounding.iterations, session.generator)
            return learn_signed_roundings(list(layers.values()), loss, batches, self.rounding)

        def learned() -> dict[str, Tensor]:
            return {f"{path}.{part}": getattr(layer, part) for path, layer in layers.items() for part in PARTS}

        def restore(kept: dict[str, Tensor]) -> None:
            for path, layer in layers.items():
                codes, scale, zero_point = (kept[f"{path}.{part}"].to(layer.weight.device) for part in PARTS)
                fold(layer, codes, scale, zero_point)

        session.learn(unit, learn, learned, restore)

    def learning_bytes(self, layers: Sequence[QuantizedLayer], loss: Callable[[], Tensor]) -> int:
        """See `BlockwiseRounding`."""

        def start() -> list[nn.Parameter]:
            return [part for layer in layers for part in start_rounding(layer).learned]

        # The best so far is kept of each parameter.
        return iteration_bytes(layers, start, 1, loss, lambda: None)


def learn_signed_roundings(
    layers: Sequence[QuantizedLayer], loss: Loss, batches: Iterator[Tensor], config: SignedRoundingConfig
) -> list[float]:
    """Learn the roundings of ``layers`` on ``loss(row indices)``; returns the loss at each iteration.

    The layers are folded as they were when the loss of a batch was smallest (algorithm 1 of the paper).
    """
    roundings = [start_rounding(layer) for layer in layers]
    parameters = [part for rounding in roundings for part in rounding.learned]
    best, smallest = [part.detach().clone() for part in parameters], math.inf
    losses = Losses(*RECONSTRUCTION)
    with torch.enable_grad():
        for iteration, rows in enumerate(batches):
            value = loss(rows)
            losses.add(value)
            latest = losses.read()[-1]
            if latest < smallest:
                smallest = latest
                for kept, part in zip(best, parameters, strict=True):
                    kept.copy_(part.detach())
            for part in parameters:
                part.grad = None
            value.backward()
            for rounding in roundings:
                rounding.step(config.rate(iteration))
    with torch.no_grad():
        for part, kept in zip(parameters, best, strict=True):
            part.copy_(kept)
        for layer, rounding in zip(layers, roundings, strict=True):
            fold(layer, rounding.codes().to(torch.uint8), *rounding.ranges())
    return losses.read()


def start_rounding(layer: QuantizedLayer) -> AutoRound:
    """Let a layer learn its rounding from its min-max ranges, extended to contain 0."""
    weight = layer.weight.detach()
    groups = [group.flatten(1) for group in weight.split(layer.splits, 1)]
    low = torch.stack([group.amin(1).clamp_max(0) for group in groups], 1)
    high = torch.stack([group.amax(1).clamp_min(0) for group in groups], 1)
    layer.rounding = rounding = AutoRound(weight, low, high, layer.weight_bits, layer.symmetric_weight, layer.spread)
    return rounding


def fold(layer: QuantizedLayer, codes: Tensor, scale: Tensor, zero_point: Tensor) -> None:
    """Give a layer its codes and ranges for good."""
    layer.rounding, layer.ranged = None, True
    layer.weight_scale, layer.weight_zero_point = scale, zero_point
    layer.load_codes(codes)
