"""Temporal features looked up by time step instead of computed (Temporal Feature Matters, arXiv 2407.19547).

With T sampling steps the projection of the time embedding in a residual block has T outputs. They are computed ahead in
full precision, quantised with a range of their own for each step, and kept; the layers that made them are dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tfmq.modules.fake_quantize import StepTracker
from tfmq.modules.number_types import KeepsTypes
from tfmq.network.backbone import Backbone, Network
from tfmq.numerics.affine import Grid, dequantize, quantize
from tfmq.numerics.observer import minmax
from tfmq.precision import FULL


@dataclass(frozen=True)
class CachePlan:
    """How one table is made.

    Attributes:
        bits: of its codes; 32 for floats.
        keeps_layer: whether the layer stays, for the steps that are not looked up.
    """

    bits: int
    keeps_layer: bool


class CachedProjection(KeepsTypes):
    """Takes the place of a time projection.

    Buffers:
        codes: (S, C), one row for each of ``tracker.steps``; uint8, int32 above 8 bits, or the float32 features
            themselves at 32 bits.
        scale, zero_point: (S,).
        looked_up: bool (S,), the steps at which the table answers; at the others ``layer`` does.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    looked_up: Tensor

    def __init__(self, layer: nn.Linear, plan: CachePlan, tracker: StepTracker) -> None:
        super().__init__()
        self.bits = plan.bits
        self.tracker = tracker
        self.layer = layer if plan.keeps_layer else None
        steps = len(tracker.steps)
        dtype = torch.float32 if plan.bits == FULL else torch.uint8 if plan.bits <= 8 else torch.int32
        self.register_buffer("codes", torch.zeros(steps, layer.out_features, dtype=dtype))
        self.register_buffer("scale", torch.ones(steps, dtype=torch.float32))
        self.register_buffer("zero_point", torch.zeros(steps, dtype=torch.float32))
        self.register_buffer("looked_up", torch.ones(steps, dtype=torch.bool))

    @property
    def plan(self) -> CachePlan:
        return CachePlan(self.bits, self.layer is not None)

    def store(self, features: Tensor) -> None:
        """Quantise and keep full-precision features (S, C): each step in its own min-max range."""
        if self.bits == FULL:
            self.codes = features.clone()
            return
        self.scale, self.zero_point = minmax(features, self.bits)
        codes = quantize(features, self.scale[:, None], self.zero_point[:, None], Grid.unsigned(self.bits))
        self.codes = codes.to(self.codes.dtype)

    def features(self, index: int | Tensor) -> Tensor:
        """The features at a position in ``tracker.steps``, (1, C), or at several, (B, C)."""
        rows = torch.as_tensor(index, device=self.codes.device).reshape(-1)
        return dequantize(self.codes[rows], self.scale[rows, None], self.zero_point[rows, None])

    def forward(self, x: Tensor) -> Tensor:
        """(B, C) for the current step of the tracker; ``x`` (B, D) only tells B and type, unless the layer answers."""
        index = self.tracker.index
        looked_up = self.looked_up[index]
        if self.layer is None or looked_up.all():
            return self.features(index).to(x.dtype).expand(len(x), -1)
        if not looked_up.any():
            return self.layer(x)
        return torch.where(looked_up[:, None], self.features(index).to(x.dtype), self.layer(x))


def insert_cache(network: Network, plans: Mapping[str, CachePlan], backbone: Backbone) -> None:
    """Put tables in the place of time projections, in place; they are empty until ``store`` or a checkpoint fills them.

    Where no projection is left to compute, the time-embedding network goes too.
    """
    for path, plan in plans.items():
        cached = CachedProjection(network.get_submodule(path), plan, network.step_tracker)
        network.set_submodule(path, cached.to(network.device))
    projections = [network.get_submodule(path) for path in backbone.time_projections]
    dropped = [isinstance(each, CachedProjection) and each.layer is None for each in projections]
    if dropped and all(dropped):
        backbone.drop_time_embedding(network)


def cached_projections(network: nn.Module) -> dict[str, CachedProjection]:
    """The tables in a network, by path."""
    return {path: module for path, module in network.named_modules() if isinstance(module, CachedProjection)}
