"""Which grids weights and activations get: decided before anything is quantised."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tfmq.network.backbone import Backbone, Network
from tfmq.passes import Pass
from tfmq.plan import QuantizationPlan
from tfmq.session import Session
from tfmq.settings import check_counts


@dataclass(frozen=True)
class Grids(Pass):
    """Change the default grids: asymmetric, calibrated, one an activation tensor and one an output channel of a weight.

    Attributes:
        split_shortcuts: own ranges for the two halves of concatenated shortcuts (Q-Diffusion).
        weight_group: input channels that share a weight range in each output channel; None for all of them. Goes with
            dynamic activations.
        symmetric_activations: signed grids with zero point 0.
        dynamic_activations: ranges are computed at run time.
    """

    split_shortcuts: bool = False
    weight_group: int | None = None
    symmetric_activations: bool = False
    dynamic_activations: bool = False

    sees_activations = False

    def __post_init__(self) -> None:
        if self.weight_group is not None:
            check_counts(self, "weight_group")
            if not self.dynamic_activations:
                raise ValueError("groups of input channels go with dynamic activations: set both")

    def amend(self, plan: QuantizationPlan, network: Network, backbone: Backbone) -> QuantizationPlan:
        """See `Pass`."""
        own: dict[str, Any] = {"symmetric": True} if self.symmetric_activations else {}
        own |= {"dynamic": True} if self.dynamic_activations else {}
        layers = {}
        for path, layer in plan.layers.items():
            splits = backbone.shortcut_splits.get(path, ()) if self.split_shortcuts else layer.splits
            if self.weight_group is not None:
                splits = group_sizes(network.get_submodule(path).weight.shape[1], self.weight_group)
            layers[path] = replace(layer, splits=splits, **own)
        attentions = {path: replace(attention, **own) for path, attention in plan.attentions.items()}
        return replace(plan, layers=layers, attentions=attentions)

    def run(self, session: Session, rows: None) -> None:
        """Nothing: the layers were put in place with these grids."""


def group_sizes(channels: int, group: int) -> tuple[int, ...]:
    """Sizes of consecutive groups of ``group`` channels; the last is smaller where ``channels`` is no multiple."""
    return tuple(min(group, channels - start) for start in range(0, channels, group))
