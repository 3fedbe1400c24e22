"""TFMQ-DM: keeping temporal features (Huang et al., CVPR 2024, arXiv 2311.16503).

The temporal information block is every layer whose input is the time step alone: the time-embedding network and the
projection in each residual block. With T sampling steps it only ever sees T inputs, so it is reconstructed on exactly
these (temporal-information-aware reconstruction), and each step gets activation ranges of its own (finite-set
calibration, `tfmq.passes.finite_set`), at no cost when sampling.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tfmq.cost import Shapes
from tfmq.modules.layers import QuantizedLayer
from tfmq.passes import Cost, Memory, Pass
from tfmq.passes.reconstruction import RoundingConfig, learn_roundings, reconstruction_loss, rounding_bytes
from tfmq.plan import quantized_layers
from tfmq.session import Session


@dataclass(frozen=True)
class TemporalReconstruction(Pass):
    """Learn the roundings of the temporal information block jointly on the finite set of time steps.

    Minimises sum_i ||emb_{t,i} - emb_hat_{t,i}||^2 over the projections i for steps t drawn from the finite set (eq. 8
    of the paper).
    """

    rounding: RoundingConfig = RoundingConfig()

    sees_activations = False

    def run(self, session: Session, rows: None) -> None:
        """See `Pass`."""
        layers = {path: layer for path, layer in temporal_layers(session).items() if layer.codes is None}
        if not layers:
            return
        network, backbone, norm = session.network, session.backbone, self.rounding.norm
        timesteps = session.finite_set.to(network.device)
        with torch.no_grad():
            targets = backbone.temporal_features(session.full, timesteps)

        def loss(index: Tensor) -> Tensor:
            features = backbone.temporal_features(network, timesteps[index])
            losses = [reconstruction_loss(f, t[index], norm) for f, t in zip(features, targets, strict=True)]
            return torch.stack(losses).sum()

        learn_roundings(session, "temporal information block", layers, loss, len(timesteps), self.rounding)

    def cost(self, shapes: Shapes, rows: None) -> Cost:
        """See `Pass`."""
        layers = shapes.unrounded & set(shapes.backbone.temporal)
        shapes.rounded |= layers
        return Cost(optimizer_steps=self.rounding.iterations if layers else 0)

    def memory(self, shapes: Shapes, rows: None) -> Memory:
        """See `Pass`."""
        paths = shapes.unrounded & set(shapes.backbone.temporal)
        layers = [layer for path, layer in quantized_layers(shapes.network).items() if path in paths]
        if not layers:
            return Memory()
        timesteps = shapes.pool.timesteps.unique().to(shapes.network.device)

        def loss() -> Tensor:
            targets = shapes.backbone.temporal_features(shapes.full, timesteps)
            features = shapes.backbone.temporal_features(shapes.network, timesteps[: self.rounding.batch])
            losses = [reconstruction_loss(f, t[: len(f)], 2.0) for f, t in zip(features, targets, strict=True)]
            return torch.stack(losses).sum()

        return Memory(rounding_bytes(layers, loss))


@dataclass(frozen=True)
class FreezeTemporal(Pass):
    """Round the layers of the temporal information block to nearest in their min-max ranges."""

    sees_activations = False

    def run(self, session: Session, rows: None) -> None:
        """See `Pass`."""
        for layer in temporal_layers(session).values():
            if layer.codes is None:
                layer.find_weight_range("minmax")
                layer.fold()

    def cost(self, shapes: Shapes, rows: None) -> Cost:
        """See `Pass`."""
        shapes.rounded |= set(shapes.backbone.temporal) & set(shapes.plan.layers)
        return Cost()


def temporal_layers(session: Session) -> dict[str, QuantizedLayer]:
    """The quantised layers of the temporal information block, by path."""
    quantized = quantized_layers(session.network)
    return {path: quantized[path] for path in session.backbone.temporal if path in quantized}
