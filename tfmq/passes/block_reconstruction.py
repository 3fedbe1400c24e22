"""Block reconstruction: learning the roundings of weights block by block (BRECQ, Li et al. 2021, arXiv 2102.05426).

Inputs come from the network quantised so far, targets from full precision, and activations are not quantised: the
weight pass of BRECQ as Q-Diffusion and TFMQ-DM run it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from tqdm.auto import tqdm

from tfmq.cost import Shapes, evaluation_bytes, units_of
from tfmq.modules.layers import QuantizedLayer
from tfmq.network.backbone import Block, Network
from tfmq.network.calibration import CalibrationSet, Draw, Spaced
from tfmq.network.offload import BlockStream, place_for
from tfmq.network.rows import CalibrationRows
from tfmq.passes import Cost, Memory, Pass
from tfmq.passes.reconstruction import (
    RoundingConfig,
    learn_roundings,
    learning_bytes,
    loss_against,
    on_rows,
    time_layer_data,
)
from tfmq.plan import quantized_layers
from tfmq.session import Session
from tfmq.settings import check_counts


@dataclass(frozen=True)
class BlockReconstruction(Pass[CalibrationRows]):
    """Learn the roundings of all layers that no earlier pass has rounded: layers of embeddings, then block by block.

    Attributes:
        rounding: how roundings are learned.
        data: which rows of the pool they are learned on.
        batch: rows evaluated at once where nothing is learned.
        memory_bytes: most memory that rows waiting between blocks may take. More wait where the workspace says, and
            are refused where it does not.
    """

    rounding: RoundingConfig = RoundingConfig()
    data: Draw = Spaced(20, 256)
    batch: int = 64
    memory_bytes: int = field(default=8 * 2**30, compare=False)

    sees_activations = False

    def __post_init__(self) -> None:
        check_counts(self, "batch", "memory_bytes")

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
                loss = loss_against(targets, on_rows(layers[path], x), self.rounding.norm)
                learn_roundings(session, path, layers, loss, len(x), self.rounding)
        reference, stream = (BlockStream(each, backbone, rows, self.batch, place) for each in (full, network))
        for block in tqdm(backbone.blocks, desc=self.name, disable=None):
            targets = reference.outputs(block, reference.inputs(block))
            reference.advance(block, targets)
            inputs = stream.inputs(block)
            layers = unrounded_layers(network, block)
            if layers:
                predict = partial(stream.evaluate, network, block, inputs)
                loss = loss_against(targets, predict, self.rounding.norm)
                learn_roundings(session, block.path, layers, loss, len(rows), self.rounding)
            stream.advance(block, stream.outputs(block, inputs))
        session.count_evaluations(2 * len(rows))

    def cost(self, shapes: Shapes, rows: CalibrationRows) -> Cost:
        """See `Pass`."""
        steps = self.rounding.iterations * units_of(shapes.backbone, shapes.unrounded)
        shapes.rounded |= shapes.unrounded
        return Cost(2 * len(rows), steps, self.rounding.iterations * min(self.rounding.batch, len(rows)))

    def memory(self, shapes: Shapes, rows: CalibrationRows) -> Memory:
        """See `Pass`."""
        learned = shapes.of_blocks(rows, self.rounding.batch, partial(learning_bytes, shapes.unrounded))
        evaluated = shapes.of_blocks(rows, self.batch, evaluation_bytes)
        waiting = [2 * each for each in shapes.waiting(rows)]
        return Memory.of_blocks(list(map(max, learned, evaluated)), waiting, self.memory_bytes)


def unrounded_layers(network: Network, block: Block) -> dict[str, QuantizedLayer]:
    """The quantised layers of a block whose weights are not rounded yet, by path in ``network``."""
    return {p: layer for p, layer in quantized_layers(network).items() if block.holds(p) and layer.codes is None}
