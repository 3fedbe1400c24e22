"""Timestep-channel reparameterisation of TCAQ-DM (arXiv 2412.16700): input ranges of channels move into the weight."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from tfmq.cost import Shapes
from tfmq.modules.channel_scales import divides_channels, set_factors
from tfmq.network.backbone import Backbone, Network, evaluate
from tfmq.network.calibration import CalibrationSet, Draw, Spaced
from tfmq.network.rows import CalibrationRows
from tfmq.numerics.channel_scales import channel_largest, joint_factors, step_groups
from tfmq.passes import Cost, Memory, Pass
from tfmq.passes.low_rank import hooked
from tfmq.plan import QuantizationPlan, quantized_layers
from tfmq.precision import FULL
from tfmq.session import Session
from tfmq.settings import check_choices, check_counts, check_numbers

ScaledLayers = Literal["convolutions", "all"]


@dataclass(frozen=True)
class ScaleChannels(Pass[CalibrationRows]):
    """Divide the channels of layers' inputs by factors, and multiply the weights by them; before weights get ranges.

    Time steps are split evenly into groups, in each of which every channel has a range in full precision
    (`tfmq.numerics.channel_scales.joint_factors`). Layers whose input is not quantised, or depends on the time step or
    conditions alone, stay as they are, and so do those with a low-rank branch or groups of convolution.

    Attributes:
        groups: of time steps; more than there are steps are one each.
        strength: 1 makes input ranges even; less leaves a share of them to the input where weights are wide.
        most: by how much at most a channel is divided or multiplied, relative to the mean of all.
        layers: ``convolutions`` alone, or ``all``.
        data: which rows of the pool.
        batch: rows evaluated at once.
    """

    groups: int = 10
    strength: float = 1.0
    most: float = 10.0
    layers: ScaledLayers = "convolutions"
    data: Draw = Spaced(None, 64)
    batch: int = 64

    sees_activations = False

    def __post_init__(self) -> None:
        check_choices(self)
        check_counts(self, "groups", "batch")
        check_numbers(self, "strength", least=0, most=1)
        check_numbers(self, "most", least=1)

    def amend(self, plan: QuantizationPlan, network: Network, backbone: Backbone) -> QuantizationPlan:
        """See `Pass`."""
        of_time = {*backbone.temporal, *backbone.embedding}
        layers = {
            path: replace(layer, channel_scales=True)
            if path not in of_time
            and layer.activation_bits < FULL
            and not layer.rank
            and self._takes(network.get_submodule(path))
            else layer
            for path, layer in plan.layers.items()
        }
        return replace(plan, layers=layers)

    def draw(self, pool: CalibrationSet, generator: torch.Generator) -> CalibrationRows:
        """See `Pass`."""
        return self.data(pool, generator)

    @torch.no_grad()
    def run(self, session: Session, rows: CalibrationRows) -> None:
        """See `Pass`. Raises ValueError for activations that hold NaN or infinity, and for a branch in a later pass."""
        quantized = quantized_layers(session.network)
        layers = {path: layer for path, layer in quantized.items() if divides_channels(layer)}
        if not layers:
            return
        for path, layer in layers.items():
            if layer.rank:
                raise ValueError(f"{path} has a low-rank branch, which smooths its input: let ScaleChannels come later")
        steps = rows.timesteps.unique()
        groups = step_groups(len(steps), self.groups)[torch.searchsorted(steps, rows.timesteps)]
        largest = largest_by_group(session.full, list(layers), rows, groups, self.batch)
        for path, layer in layers.items():
            of_weight = layer.weight.transpose(0, 1).flatten(1).abs().amax(1)
            set_factors(layer, joint_factors(largest[path], of_weight, self.strength, self.most))
        session.count_evaluations(len(rows))

    def cost(self, shapes: Shapes, rows: CalibrationRows) -> Cost:
        """See `Pass`."""
        return Cost(len(rows) if self._any(shapes) else 0)

    def memory(self, shapes: Shapes, rows: CalibrationRows) -> Memory:
        """See `Pass`."""
        return Memory(shapes.evaluated(rows, self.batch, shapes.full)) if self._any(shapes) else Memory()

    def _takes(self, layer: nn.Module) -> bool:
        return (self.layers == "all" or isinstance(layer, nn.Conv2d)) and getattr(layer, "groups", 1) == 1

    def _any(self, shapes: Shapes) -> bool:
        return any(layer.channel_scales for layer in shapes.plan.layers.values())


def largest_by_group(
    network: Network, paths: list[str], rows: CalibrationRows, groups: Tensor, batch: int
) -> dict[str, Tensor]:
    """The largest magnitude of each input channel of the layers at ``paths`` in each group of rows: (G, C) by path.

    ``groups`` (N,) counts from 0, and says which group each row is of. Raises ValueError for NaN or infinity.
    """
    found: dict[str, Tensor] = {}

    def record(path: str, layer: nn.Conv2d | nn.Linear, x: Tensor, output: Tensor) -> None:
        by_row = channel_largest(x, 1 if isinstance(layer, nn.Conv2d) else -1)
        if not torch.isfinite(by_row).all():
            raise ValueError(f"the activation at {path} holds NaN or infinity on the calibration set")
        empty = by_row.new_zeros(int(groups.max()) + 1, by_row.shape[1])
        index = present.to(by_row.device)[:, None].expand_as(by_row)
        found[path] = found.get(path, empty).scatter_reduce(0, index, by_row, "amax")

    with hooked(network, paths, record):
        for start in tqdm(range(0, len(rows), batch), desc="channel scales", disable=None):
            part, present = rows[slice(start, start + batch)], groups[start : start + batch]
            evaluate(network, part.latents, part.timesteps.to(network.device), part.context, part.inputs)
    return found
