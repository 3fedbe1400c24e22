"""Block reconstruction: learning the roundings of weights block by block (BRECQ, Li et al. 2021, arXiv 2102.05426).

Inputs come from the network quantised so far, targets from full precision, and activations are not quantised: the
weight pass of BRECQ as Q-Diffusion and TFMQ-DM run it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from tfmq.cost import Shapes, evaluation_bytes, units_of
from tfmq.modules.layers import QuantizedLayer
from tfmq.network.backbone import Block, Network
from tfmq.network.calibration import CalibrationSet, Draw, Spaced
from tfmq.network.offload import BlockStream, place_for
from tfmq.network.rows import CalibrationRows
from tfmq.passes import Cost, Memory, Pass
from tfmq.passes.reconstruction import (
    Loss,
    RoundingConfig,
    block_loss,
    learn_roundings,
    loss_against,
    on_rows,
    rounding_bytes,
    time_layer_data,
)
from tfmq.plan import quantized_layers
from tfmq.session import Session
from tfmq.settings import check_counts


class Learning(Protocol):
    """What settings of learning a unit have, whichever they are."""

    @property
    def iterations(self) -> int:
        """Optimiser steps for each unit that is learned."""

    @property
    def batch(self) -> int:
        """Rows in each."""

    @property
    def norm(self) -> float:
        """Exponent of the reconstruction loss."""


@dataclass(frozen=True)
class BlockwiseRounding(Pass[CalibrationRows]):
    """What passes share that learn all layers that no earlier pass has rounded: those of embeddings, then by block.

    Attributes:
        rounding: how a unit is learned.
        data: which rows of the pool it is learned on.
        batch: rows evaluated at once where nothing is learned.
        memory_bytes: most memory that rows waiting between blocks may take. More wait where the workspace says, and
            are refused where it does not.
    """

    rounding: Learning
    data: Draw = Spaced(20, 256)
    batch: int = 64
    memory_bytes: int = field(default=8 * 2**30, compare=False)

    sees_activations = False

    def __post_init__(self) -> None:
        check_counts(self, "batch", "memory_bytes")

    @abstractmethod
    def learn(self, session: Session, unit: str, layers: Mapping[str, QuantizedLayer], loss: Loss, rows: int) -> None:
        """Learn ``layers`` as one unit, on random batches of so many ``rows``, and fold them."""

    @abstractmethod
    def learning_bytes(self, layers: Sequence[QuantizedLayer], loss: Callable[[], Tensor]) -> int:
        """Bytes that learning layers on the meta device takes."""

    def draw(self, pool: CalibrationSet, generator: torch.Generator) -> CalibrationRows:
        """See `Pass`."""
        return self.data(pool, generator)

    def run(self, session: Session, rows: CalibrationRows) -> None:
        """See `Pass`. Raises ValueError for rows that do not fit, a block's NaN or infinity, and a loss of these."""
        network, full, backbone = session.network, session.full, session.backbone
        place = place_for(full, backbone, rows, 2, self.memory_bytes, session.workspace.allocate)
        for path in backbone.embedding:
            layers = unrounded_layers(network, Block(path))
            if layers:
                x, targets = time_layer_data(backbone, network, full, path, rows)
                self.learn(session, path, layers, self._loss(targets, on_rows(layers[path], x)), len(x))
        reference, stream = (BlockStream(each, backbone, rows, self.batch, place) for each in (full, network))
        for block in tqdm(backbone.blocks, desc=self.name, disable=None):
            targets = reference.outputs(block, reference.inputs(block))
            reference.advance(block, targets)
            inputs = stream.inputs(block)
            layers = unrounded_layers(network, block)
            if layers:
                predict = partial(stream.evaluate, network, block, inputs)
                self.learn(session, block.path, layers, self._loss(targets, predict), len(rows))
            stream.advance(block, stream.outputs(block, inputs))
        session.count_evaluations(2 * len(rows))

    def cost(self, shapes: Shapes, rows: CalibrationRows) -> Cost:
        """See `Pass`."""
        steps = self.rounding.iterations * units_of(shapes.backbone, shapes.unrounded)
        shapes.rounded |= shapes.unrounded
        return Cost(2 * len(rows), steps, self.rounding.iterations * min(self.rounding.batch, len(rows)))

    def memory(self, shapes: Shapes, rows: CalibrationRows) -> Memory:
        """See `Pass`."""
        learned = shapes.of_blocks(rows, self.rounding.batch, partial(self._bytes_of_block, shapes.unrounded))
        evaluated = shapes.of_blocks(rows, self.batch, evaluation_bytes)
        waiting = [2 * each for each in shapes.waiting(rows)]
        return Memory.of_blocks(list(map(max, learned, evaluated)), waiting, self.memory_bytes)

    def _loss(self, targets: Tensor, predict: Callable[[Tensor], Tensor]) -> Loss:
        return loss_against(targets, predict, self.rounding.norm)

    def _bytes_of_block(self, paths: Collection[str], stream: BlockStream, block: Block) -> int:
        """Of those layers of a block whose path is among ``paths``."""
        quantized = quantized_layers(stream.network)
        layers = [layer for path, layer in quantized.items() if block.holds(path) and path in paths]
        return self.learning_bytes(layers, partial(block_loss, stream, block)) if layers else 0


@dataclass(frozen=True)
class BlockReconstruction(BlockwiseRounding):
    """Learn the roundings of all layers that no earlier pass has rounded: layers of embeddings, then block by block."""

    rounding: RoundingConfig = RoundingConfig()

    def learn(self, session: Session, unit: str, layers: Mapping[str, QuantizedLayer], loss: Loss, rows: int) -> None:
        """See `BlockwiseRounding`."""
        learn_roundings(session, unit, layers, loss, rows, self.rounding)

    def learning_bytes(self, layers: Sequence[QuantizedLayer], loss: Callable[[], Tensor]) -> int:
        """See `BlockwiseRounding`."""
        return rounding_bytes(layers, loss)


def unrounded_layers(network: Network, block: Block) -> dict[str, QuantizedLayer]:
    """The quantised layers of a block whose weights are not rounded yet, by path in ``network``."""
    return {p: layer for p, layer in quantized_layers(network).items() if block.holds(p) and layer.codes is None}
