"""Learning the step sizes of activations block by block (Q-Diffusion, Li et al., ICCV 2023, arXiv 2302.04304)."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from tqdm.auto import tqdm

from tfmq.cost import Shapes, evaluation_bytes, units_of
from tfmq.modules.fake_quantize import FakeQuantize
from tfmq.network.backbone import Block, Network
from tfmq.network.calibration import CalibrationSet, Draw, Spaced
from tfmq.network.offload import BlockStream, place_for
from tfmq.network.rows import CalibrationRows
from tfmq.passes import Cost, Memory, Pass
from tfmq.passes.reconstruction import (
    StepSizeConfig,
    learn_scales,
    loss_against,
    on_rows,
    step_size_bytes,
    time_layer_data,
)
from tfmq.plan import activation_quantizers
from tfmq.session import Session
from tfmq.settings import check_counts


@dataclass(frozen=True)
class StepSizes(Pass[CalibrationRows]):
    """Learn the step sizes of activations that have one for all time steps: layers of embeddings, then block by block.

    Inputs and targets both come from full precision, as in Q-Diffusion's released activation pass. Does nothing where
    there is no such step size.

    Attributes:
        learning: how step sizes are learned.
        data, batch, memory_bytes: as in `tfmq.passes.block_reconstruction.BlockReconstruction`.
    """

    learning: StepSizeConfig = StepSizeConfig()
    data: Draw = Spaced(20, 256)
    batch: int = 64
    memory_bytes: int = field(default=8 * 2**30, compare=False)

    def __post_init__(self) -> None:
        check_counts(self, "batch", "memory_bytes")

    def draw(self, pool: CalibrationSet, generator: torch.Generator) -> CalibrationRows:
        """See `Pass`."""
        return self.data(pool, generator)

    def run(self, session: Session, rows: CalibrationRows) -> None:
        """See `Pass`. Raises ValueError for rows that do not fit, a block's NaN or infinity, and a loss of these."""
        network, full, backbone = session.network, session.full, session.backbone
        if not any(_learnable(network, block, ()) for block in (*map(Block, backbone.embedding), *backbone.blocks)):
            return
        place = place_for(full, backbone, rows, 1, self.memory_bytes, session.workspace.allocate)
        for path in backbone.embedding:
            quantizers = _learnable(network, Block(path), ())
            if quantizers:
                x, targets = time_layer_data(backbone, full, full, path, rows)
                loss = loss_against(targets, on_rows(network.get_submodule(path), x), self.learning.norm)
                learn_scales(session, path, quantizers, loss, len(x), self.learning)
        reference = BlockStream(full, backbone, rows, self.batch, place)
        for block in tqdm(backbone.blocks, desc=self.name, disable=None):
            inputs = reference.inputs(block)
            targets = reference.outputs(block, inputs)
            quantizers = _learnable(network, block, backbone.embedding)
            if quantizers:
                predict = partial(reference.evaluate, network, block, inputs)
                loss = loss_against(targets, predict, self.learning.norm)
                learn_scales(session, block.path, quantizers, loss, len(rows), self.learning)
            reference.advance(block, targets)
        session.count_evaluations(len(rows))

    def cost(self, shapes: Shapes, rows: CalibrationRows) -> Cost:
        """See `Pass`."""
        units = self._units(shapes)
        if not units:
            return Cost()
        iterations = self.learning.iterations
        return Cost(len(rows), iterations * units, iterations * min(self.learning.batch, len(rows)))

    def memory(self, shapes: Shapes, rows: CalibrationRows) -> Memory:
        """See `Pass`."""
        if not self._units(shapes):
            return Memory()
        paths = {*shapes.plan.layers, *shapes.plan.attentions} - {*shapes.tabulated, *shapes.backbone.embedding}
        learned = shapes.of_blocks(rows, self.learning.batch, partial(step_size_bytes, paths))
        evaluated = shapes.of_blocks(rows, self.batch, evaluation_bytes)
        return Memory.of_blocks(list(map(max, learned, evaluated)), shapes.waiting(rows), self.memory_bytes)

    def _units(self, shapes: Shapes) -> int:
        """How many units have a step size to learn."""
        if not shapes.calibrates or not shapes.calibrated:
            return 0
        return units_of(shapes.backbone, {*shapes.plan.layers, *shapes.plan.attentions} - shapes.tabulated)


def _learnable(network: Network, block: Block, learned: tuple[str, ...]) -> dict[str, FakeQuantize]:
    """The quantisers of a block that have one scale for all steps, but for those of the layers ``learned`` before."""
    found = {path: q for path, q in activation_quantizers(network).items() if q.enabled and not q.per_step}
    before = tuple(f"{path}." for path in learned)
    return {path: q for path, q in found.items() if block.holds(path) and not path.startswith(before)}
