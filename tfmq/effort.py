"""What a quantisation will spend, said before it is done: from its settings and the structure of the network alone.

The counts are those that `tfmq.quantization.quantize_` reports; no weight is looked at, so that a network on the meta
device will do.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from tfmq.network.calibration import CalibrationRows
from tfmq.network.unet import UNet, UNetLayout
from tfmq.plan import SHARED, Protocol, QuantizationPlan, plan_for
from tfmq.precision import Precision
from tfmq.quantization import QuantizationConfig


@dataclass(frozen=True)
class PlannedEffort:
    """What a quantisation will spend.

    Attributes:
        weight_evaluations, activation_evaluations: sample evaluations of the UNet in the two phases of a report.
        optimizer_steps: the steps of all reconstructions.
        learned_rows: how many rows pass the whole UNet forward and backward, a part in the learning of each block;
            learning that concerns the time step alone is not in it, since that takes next to nothing a step.
        waiting_rows: most rows that wait between two blocks, all streams together.
    """

    weight_evaluations: int = 0
    activation_evaluations: int = 0
    optimizer_steps: int = 0
    learned_rows: int = 0
    waiting_rows: int = 0

    @property
    def unet_evaluations(self) -> int:
        """Sample evaluations of the UNet, as `tfmq.passes.reconstruction.Effort` counts them."""
        return self.weight_evaluations + self.activation_evaluations


def planned_effort(
    unet: UNet,
    precision: Precision,
    config: QuantizationConfig,
    rows: CalibrationRows,
    activation_rows: CalibrationRows,
    protocol: Protocol = SHARED,
) -> PlannedEffort:
    """What ``quantize_`` with these arguments will spend; of the rows only the counts matter."""
    layout = UNetLayout.of(unet)
    plan = plan_for(unet, layout, precision, protocol)
    if config.caching == "all":
        plan = replace(plan, layers={path: layer for path, layer in plan.layers.items() if path not in layout.temporal})
    calibrates = precision.quantizes_activations and not config.dynamic_activations
    temporal = set(layout.temporal) & set(plan.layers)
    in_weights, in_activations = 0, len(activation_rows) if calibrates else 0
    steps = learned = waiting = 0
    if config.low_rank is not None:
        in_weights += len(rows) + min(config.low_rank.search_rows, len(rows))
    if config.temporal is not None and temporal:
        steps += config.temporal.iterations
    if config.rounding is not None:
        folded = temporal if config.temporal is not None or config.freeze_temporal else set()
        steps += config.rounding.iterations * _units(layout, set(plan.layers) - folded)
        learned += config.rounding.iterations * min(config.rounding.batch, len(rows))
        in_weights += 2 * len(rows)
        waiting = 2 * len(rows)
    if calibrates and config.step_sizes is not None:
        units = _units(layout, _with_one_scale(layout, plan, config))
        steps += config.step_sizes.iterations * units
        learned += config.step_sizes.iterations * min(config.step_sizes.batch, len(rows)) * bool(units)
        in_activations += len(rows)
        waiting = max(waiting, len(rows))
    return PlannedEffort(in_weights, in_activations, steps, learned, waiting)


def _with_one_scale(layout: UNetLayout, plan: QuantizationPlan, config: QuantizationConfig) -> set[str]:
    """Paths of the layers and attention modules whose activation scales are not tables, and so are learned."""
    if config.activation_scales == "per_step":
        return set()
    tables = layout.temporal if config.activation_scales == "temporal" else ()
    return {*plan.layers, *plan.attentions} - set(tables)


def _units(layout: UNetLayout, paths: Iterable[str]) -> int:
    """How many of the time-embedding layers, and of the blocks, are or hold any of ``paths``."""
    inside = tuple(f"{path}." for path in paths)
    units = (*layout.time_embedding, *(block.path for block in layout.blocks))
    return sum(any(path.startswith(f"{unit}.") for path in inside) for unit in units)
