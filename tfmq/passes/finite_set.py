"""Finite-set calibration of TFMQ-DM (arXiv 2311.16503): activation ranges for each time step in the temporal block."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tfmq.cost import Shapes
from tfmq.passes import Cost, Pass
from tfmq.passes.temporal_reconstruction import temporal_layers
from tfmq.plan import activation_quantizers
from tfmq.session import Session


@dataclass(frozen=True)
class FiniteSetCalibration(Pass):
    """Give each activation in the temporal information block its min-max range at every time step.

    At one step such an activation is one known vector, so that its range is exact.
    """

    @torch.no_grad()
    def run(self, session: Session, rows: None) -> None:
        """See `Pass`."""
        if not session.precision.quantizes_activations:
            return
        network, tracker = session.network, session.network.step_tracker
        layers = temporal_layers(session).values()
        if not session.backbone.temporal:  # in LCM nothing depends on the time step alone
            return
        tracker.steps = session.finite_set
        quantizers = [quantizer for layer in layers for quantizer in activation_quantizers(layer).values()]
        for quantizer in quantizers:
            quantizer.observe(per_step=True)
        tracker.set(tracker.steps)
        session.backbone.temporal_features(network, tracker.steps.to(network.device))
        for quantizer in quantizers:
            quantizer.freeze()

    def cost(self, shapes: Shapes, rows: None) -> Cost:
        """See `Pass`."""
        shapes.tabulated |= set(shapes.backbone.temporal)
        return Cost()
