"""The adaptive quantiser of TCAQ-DM (arXiv 2412.16700): a logarithmic grid where probabilities follow a power law."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from tqdm.auto import tqdm

from tfmq.cost import Shapes
from tfmq.modules.adaptive import AdaptiveQuantize
from tfmq.network.backbone import Backbone, Network, evaluate
from tfmq.network.calibration import CalibrationSet, Draw, Spaced
from tfmq.network.rows import CalibrationRows
from tfmq.passes import Cost, Memory, Pass
from tfmq.passes.activation_ranges import watched
from tfmq.plan import QuantizationPlan, activation_quantizers
from tfmq.session import Session
from tfmq.settings import check_counts, check_numbers


@dataclass(frozen=True)
class AdaptiveProbabilities(Pass[CalibrationRows]):
    """Quantise each attention's probabilities on a logarithmic grid if they follow a power law, else on a uniform one.

    Whether they do is decided by likelihood-ratio tests (`tfmq.numerics.power_law`) on the probabilities of calibration
    rows, which pass unquantised. Ranges are the widest seen. Does nothing where attention is dynamic or in full
    precision. Goes before `tfmq.passes.activation_ranges.ActivationRanges`.

    Attributes:
        data: which rows of the pool; all steps of the schedule have to be among them, where each has its own grid.
        samples: values of each batch that are tested.
        significance: of the tests, below which a power law counts as found.
        per_step: a grid, and a range, for each time step.
        batch: most rows in one batch, which are of one time step where grids are.
    """

    data: Draw = Spaced(None, 64)
    samples: int = 4096
    significance: float = 0.05
    per_step: bool = True
    batch: int = 64

    def __post_init__(self) -> None:
        check_counts(self, "samples", "batch")
        check_numbers(self, "significance", least=0, most=1)

    def amend(self, plan: QuantizationPlan, network: Network, backbone: Backbone) -> QuantizationPlan:
        """See `Pass`."""
        attentions = {
            path: attention if attention.dynamic else replace(attention, adaptive=True)
            for path, attention in plan.attentions.items()
        }
        return replace(plan, attentions=attentions)

    def draw(self, pool: CalibrationSet, generator: torch.Generator) -> CalibrationRows:
        """See `Pass`."""
        return self.data(pool, generator)

    @torch.no_grad()
    def run(self, session: Session, rows: CalibrationRows) -> None:
        """See `Pass`; ``logarithmic_steps`` among the report's details is the share of the grids of each attention."""
        network = session.network
        quantizers = {p: q for p, q in activation_quantizers(network).items() if isinstance(q, AdaptiveQuantize)}
        if not quantizers:
            return
        if self.per_step:
            network.step_tracker.steps = session.finite_set
        for quantizer in quantizers.values():
            quantizer.observe_distribution(self.samples, self.significance, self.per_step)
        batches = (rows.batches_of_steps if self.per_step else rows.batches)(self.batch)
        for batch in tqdm(batches, desc=self.name, disable=None):
            evaluate(network, batch.latents, batch.timesteps.to(network.device), batch.context, batch.inputs)
        for quantizer in quantizers.values():
            quantizer.freeze()
        shares = {path: quantizer.logarithmic.float().mean().item() for path, quantizer in quantizers.items()}
        session.report.details |= {"logarithmic_steps": shares}
        session.count_evaluations(len(rows))

    def cost(self, shapes: Shapes, rows: CalibrationRows) -> Cost:
        """See `Pass`."""
        return Cost(len(rows) if self._any(shapes) else 0)

    def memory(self, shapes: Shapes, rows: CalibrationRows) -> Memory:
        """See `Pass`."""
        if not self._any(shapes):
            return Memory()
        with watched(shapes.network):
            return Memory(shapes.evaluated(rows, self.batch))

    def _any(self, shapes: Shapes) -> bool:
        return any(attention.adaptive for attention in shapes.plan.attentions.values())
