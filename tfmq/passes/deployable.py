"""Grids that integer kernels execute without a detour."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tfmq.network.backbone import Backbone, Network
from tfmq.passes import Pass, Recipe
from tfmq.plan import QuantizationPlan, quantized_layers
from tfmq.session import Session

BYTE = 8


@dataclass(frozen=True)
class Deployable(Pass):
    """Take symmetric grids where integer kernels do: weights of 8 bits, and query, key and value of attention.

    Such a weight has its codes around 128, so that they minus 128 are signed bytes, and query, key and value are signed
    with zero point 0. Each range is still found by the method's own search, among symmetric ranges. Everything else
    stays as it is: weights of fewer bits fit in signed bytes anyhow, and inputs of layers may be asymmetric. Goes first
    in a recipe; `deployable` puts it there.
    """

    sees_activations = False

    def amend(self, plan: QuantizationPlan, network: Network, backbone: Backbone) -> QuantizationPlan:
        """See `Pass`."""
        attentions = {path: replace(attention, symmetric=True) for path, attention in plan.attentions.items()}
        return replace(plan, attentions=attentions)

    def run(self, session: Session, rows: None) -> None:
        """Let weights of 8 bits find symmetric ranges. Raises ValueError for a plan without integer kernels."""
        for path, layer in session.plan.layers.items():
            if layer.dynamic:
                raise ValueError(f"the recipe gives {path} dynamic ranges, which integer kernels do not execute")
            if layer.rank:
                raise ValueError(f"the recipe gives {path} a low-rank branch, which integer kernels do not execute")
            if layer.channel_scales:
                raise ValueError(f"the recipe divides the channels of {path}, which integer kernels do not execute")
        for path, attention in session.plan.attentions.items():
            if attention.adaptive:
                raise ValueError(f"the recipe lets {path} have logarithmic grids, which integer kernels do not execute")
        take_symmetric_weights(session.network)


def take_symmetric_weights(network: Network) -> None:
    """Let the weights of 8 bits in ``network`` find symmetric ranges from now on."""
    for layer in quantized_layers(network).values():
        layer.symmetric_weight = layer.weight_bits == BYTE


def deployable(recipe: Recipe) -> Recipe:
    """``recipe`` with the grids of `Deployable`."""
    return Deployable(), *recipe
