"""Layers that a method leaves in full precision, besides those that the protocol leaves out."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tfmq.network.backbone import Backbone, Network
from tfmq.passes import Pass
from tfmq.plan import QuantizationPlan
from tfmq.session import Session
from tfmq.settings import unknown


@dataclass(frozen=True)
class LeaveOut(Pass):
    """Leave the layers of some roles (see ``Backbone.roles``) in full precision."""

    roles: tuple[str, ...]

    sees_activations = False

    def __post_init__(self) -> None:
        if isinstance(self.roles, str):
            raise ValueError(f"roles is {self.roles!r}: give a tuple of roles, such as ({self.roles!r},)")

    def amend(self, plan: QuantizationPlan, network: Network, backbone: Backbone) -> QuantizationPlan:
        """See `Pass`. Raises ValueError for a role that there is not."""
        reasons = {}
        for role in self.roles:
            if role not in backbone.roles:
                raise unknown("role", role, backbone.roles)
            for path in backbone.roles[role]:
                if path in plan.layers or path in plan.attentions:
                    reasons[path] = f"the method leaves this out ({role.replace('_', ' ')})"
        layers = {path: layer for path, layer in plan.layers.items() if path not in reasons}
        attentions = {path: attention for path, attention in plan.attentions.items() if path not in reasons}
        return replace(plan, layers=layers, attentions=attentions, reasons={**plan.reasons, **reasons})

    def run(self, session: Session, rows: None) -> None:
        """Nothing: the layers were left as they are."""
