"""TDQ's treatment of activations: step sizes that networks predict from the time step, then tabulated.

So et al., NeurIPS 2023, arXiv 2306.02316; `tfmq.passes.step_network` has the networks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from tfmq.cost import Shapes
from tfmq.network.backbone import Backbone, Network
from tfmq.network.calibration import CalibrationSet, Draw, NormallyDistributed
from tfmq.network.rows import CalibrationRows
from tfmq.passes import Cost, Memory, Pass
from tfmq.passes.activation_ranges import watched
from tfmq.passes.step_network import (
    ActivationSamples,
    FitConfig,
    StepNetworks,
    fit_networks,
    fitting_bytes,
    sample_activations,
    tabulate,
    with_silu_grids,
)
from tfmq.plan import QuantizationPlan, activation_quantizers
from tfmq.session import Session
from tfmq.settings import check_counts


@dataclass(frozen=True)
class PredictedStepSizes(Pass[CalibrationRows]):
    """Fit a network to each activation's quantisation error, and give the activation its values as a table over steps.

    Attributes:
        fit: how the networks are fitted.
        data: which rows of the pool activations are sampled on.
        values: entries of each activation drawn from each row.
        batch: rows evaluated at once.
    """

    fit: FitConfig = FitConfig()
    data: Draw = NormallyDistributed(1024, 0.4, 0.4)
    values: int = 64
    batch: int = 64

    def __post_init__(self) -> None:
        check_counts(self, "values", "batch")

    def amend(self, plan: QuantizationPlan, network: Network, backbone: Backbone) -> QuantizationPlan:
        """See `Pass`."""
        return with_silu_grids(plan, network, backbone)

    def draw(self, pool: CalibrationSet, generator: torch.Generator) -> CalibrationRows:
        """See `Pass`."""
        return self.data(pool, generator)

    def run(self, session: Session, rows: CalibrationRows) -> None:
        """See `Pass`."""
        self.tabulate(session, self.fitted(session, rows))

    def fitted(self, session: Session, rows: CalibrationRows) -> StepNetworks:
        """The network of each quantiser, fitted to its input on ``rows``."""
        network, generator = session.network, session.generator
        encode = partial(session.backbone.encoding, network)
        network.step_tracker.steps = session.finite_set
        quantizers = activation_quantizers(network)
        if not quantizers:
            raise ValueError(
                f"{self.name}: precision {session.precision} calibrates no activations to predict sizes of"
            )
        samples = sample_activations(network, rows, self.values, self.batch, generator)
        channels = encode(session.finite_set.to(network.device)).shape[1]
        networks = StepNetworks(samples.initial_steps(quantizers), channels, generator)
        session.count_evaluations(len(rows))
        session.learn(
            "step networks",
            lambda: fit_networks(networks, quantizers, samples, encode, self.fit, generator),
            networks.state_dict,
            networks.load_state_dict,
        )
        return networks

    def tabulate(self, session: Session, networks: StepNetworks) -> None:
        """Replace the networks by their values at the steps of the schedule."""
        encodings = session.backbone.encoding(session.network, session.finite_set.to(session.network.device))
        tabulate(networks, activation_quantizers(session.network), encodings)

    def cost(self, shapes: Shapes, rows: CalibrationRows) -> Cost:
        """See `Pass`."""
        shapes.tabulated |= {*shapes.plan.layers, *shapes.plan.attentions}
        shapes.calibrated = True
        return Cost(len(rows), self.fit.iterations)

    def memory(self, shapes: Shapes, rows: CalibrationRows) -> Memory:
        """See `Pass`."""
        network, quantizers = shapes.network, activation_quantizers(shapes.network)
        with watched(network):
            evaluated = shapes.evaluated(rows, self.batch)
        values = torch.empty(len(rows), len(quantizers), self.values, device=network.device)
        samples = ActivationSamples(values, rows.timesteps)
        encode = partial(shapes.backbone.encoding, network)
        return Memory(values.nbytes + max(evaluated, fitting_bytes(quantizers, samples, encode, self.fit.batch)))
