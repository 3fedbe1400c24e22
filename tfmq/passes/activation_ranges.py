"""The ranges of activations, observed while calibration rows pass through the network."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from tfmq.cost import Shapes
from tfmq.modules.fake_quantize import ActivationRange
from tfmq.network.backbone import Network, evaluate
from tfmq.network.calibration import CalibrationSet, Draw, Spaced
from tfmq.network.rows import CalibrationRows
from tfmq.passes import Cost, Memory, Pass
from tfmq.plan import activation_quantizers
from tfmq.session import Session
from tfmq.settings import check_choices, check_counts, check_numbers


@dataclass(frozen=True)
class ActivationRanges(Pass[CalibrationRows]):
    """Observe calibration rows in batches, and quantise every activation that no earlier pass does.

    Observers let their input pass unquantised, but for ``thresholds``. Does nothing where activations are not
    quantised, or are quantised dynamically.

    Attributes:
        data: which rows of the pool are observed, in their order.
        range: ``minmax``; ``search`` or ``thresholds`` for the searches of `tfmq.passes.weight_ranges.WeightRanges` in
            each batch; ``by_bits`` for ``search`` below 6 bits, else the widest ``minmax``, whatever the momentum: with
            many bits a wide range costs little, and what lies outside a narrow one turns an image into another.
        momentum: running average of ranges over batches; None keeps the widest range.
        batch: most rows in one batch.
        per_step: a range for each time step at every activation. A batch then has rows of one step, so that the running
            range of a step averages batches and not single rows.
    """

    data: Draw = Spaced(None, 256)
    range: ActivationRange = "minmax"
    momentum: float | None = None
    batch: int = 64
    per_step: bool = False

    def __post_init__(self) -> None:
        check_choices(self)
        check_counts(self, "batch")
        if self.momentum is not None:
            check_numbers(self, "momentum", least=0, most=1)

    def draw(self, pool: CalibrationSet, generator: torch.Generator) -> CalibrationRows:
        """See `Pass`."""
        return self.data(pool, generator)

    @torch.no_grad()
    def run(self, session: Session, rows: CalibrationRows) -> None:
        """See `Pass`. Raises ValueError for an activation that is constant, NaN or infinite."""
        network = session.network
        quantizers = [q for q in activation_quantizers(network).values() if not q.enabled]
        if not quantizers:
            return
        if self.per_step:
            network.step_tracker.steps = session.finite_set
        for quantizer in quantizers:
            quantizer.observe(self.momentum, self.per_step, self.range)
        batches = (rows.batches_of_steps if self.per_step else rows.batches)(self.batch)
        counts = rows.timesteps.unique(return_counts=True)[1].tolist() if self.per_step else [len(rows)]
        total = sum(math.ceil(count / self.batch) for count in counts)
        for batch in tqdm(batches, desc=self.name, total=total, disable=None):
            evaluate(network, batch.latents, batch.timesteps.to(network.device), batch.context, batch.inputs)
        for quantizer in quantizers:
            quantizer.freeze()
        session.count_evaluations(len(rows))

    def cost(self, shapes: Shapes, rows: CalibrationRows) -> Cost:
        """See `Pass`."""
        if not shapes.calibrates or shapes.calibrated:
            return Cost()
        shapes.calibrated = True
        if self.per_step:
            shapes.tabulated |= {*shapes.plan.layers, *shapes.plan.attentions}
        return Cost(len(rows))

    def memory(self, shapes: Shapes, rows: CalibrationRows) -> Memory:
        """See `Pass`."""
        if not shapes.calibrates or shapes.calibrated:
            return Memory()
        with watched(shapes.network):
            return Memory(shapes.evaluated(rows, self.batch))


@contextmanager
def watched(network: Network) -> Iterator[None]:
    """Let each activation quantiser of a network on the meta device be called, as while it observes.

    What an observed product multiplies has to be there: attention computes its matrix of probabilities.
    """
    quantizers = activation_quantizers(network).values()
    handles = [quantizer.register_forward_pre_hook(lambda *_: None) for quantizer in quantizers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
