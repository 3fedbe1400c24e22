"""Temporal features looked up instead of computed, where that keeps them better (Temporal Feature Matters).

Huang et al., TPAMI 2025, arXiv 2407.19547: with T sampling steps the outputs of the temporal information block are T
vectors for each projection, which can be computed ahead in full precision and kept in tables.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from tfmq.modules.cache import CachedProjection, CachePlan, cached_projections, insert_cache
from tfmq.network.backbone import Backbone, Network
from tfmq.passes import Pass
from tfmq.plan import QuantizationPlan, announce_step
from tfmq.session import Session
from tfmq.settings import check_choices
from tfmq.state import check_finished

Caching = Literal["all", "projection", "step"]


@dataclass(frozen=True)
class TemporalCache(Pass):
    """Look temporal features up in tables of codes with the activations' bits.

    Attributes:
        where: ``all`` looks every feature up and drops the temporal information block; the pass then goes first in a
            recipe. ``projection`` and ``step`` are disturbance-aware selection: whichever of looking up and computing
            has the smaller temporal-feature error (see ``temporal_feature_error``), chosen once for each projection
            by the mean over steps, or at each step of each projection. The pass then goes last. Ties are looked up.
    """

    where: Caching = "projection"

    def __post_init__(self) -> None:
        check_choices(self)

    def amend(self, plan: QuantizationPlan, network: Network, backbone: Backbone) -> QuantizationPlan:
        """See `Pass`. Raises ValueError for a network in which nothing depends on the time step alone (LCM)."""
        if not backbone.time_projections:
            raise ValueError(
                "a condition goes into the first layer of this network's time embedding (time_cond_proj_dim), so that "
                "there are no features of the time step alone to look up: take a recipe without TemporalCache"
            )
        if self.where != "all":
            return plan
        kept = {path: layer for path, layer in plan.layers.items() if path not in backbone.temporal}
        return replace(plan, layers=kept)

    @torch.no_grad()
    def run(self, session: Session, rows: None) -> None:
        """See `Pass`.

        Details of the report: ``projections`` (P paths), ``timesteps`` (S), ``cached`` (P lists of S booleans: looked
        up or not), and the two errors of each projection, mean over steps (``error_computed`` is missing under
        ``all``). Raises ValueError for a selection before the network is quantised.
        """
        if self.where != "all":
            check_finished(session.network, self.name)
        network, full, backbone = session.network, session.full, session.backbone
        bits, tracker = session.precision.activation_bits, network.step_tracker
        tracker.steps = session.finite_set
        steps = tracker.steps.to(network.device)
        announce_step(network, steps)
        targets = backbone.temporal_features(full, steps)
        tables = []
        for path, target in zip(backbone.time_projections, targets, strict=True):
            table = CachedProjection(full.get_submodule(path), CachePlan(bits, keeps_layer=False), tracker)
            table.to(network.device).store(target)
            tables.append(table)
        error = _feature_errors([table.features(tracker.index) for table in tables], targets)
        details = {"projections": list(backbone.time_projections), "timesteps": steps.tolist()}
        details["error_cached"] = error.mean(0).tolist()
        chosen = torch.ones_like(error, dtype=torch.bool)
        if self.where != "all":
            computed = temporal_feature_error(network, full, backbone, steps)
            details["error_computed"] = computed.mean(0).tolist()
            by_projection = (error.mean(0) <= computed.mean(0)).expand_as(error)
            chosen = by_projection if self.where == "projection" else error <= computed
        plans = {
            path: CachePlan(bits, keeps_layer=not bool(steps_chosen.all()))
            for path, steps_chosen in zip(backbone.time_projections, chosen.T, strict=True)
            if steps_chosen.any()
        }
        insert_cache(network, plans, backbone)
        columns = dict(zip(backbone.time_projections, range(len(targets)), strict=True))
        for path, projection in cached_projections(network).items():
            projection.store(targets[columns[path]])
            projection.looked_up = chosen[:, columns[path]].clone()
        session.report.details |= details | {"cached": chosen.T.tolist()}


@torch.no_grad()
def temporal_feature_error(network: Network, full: Network, backbone: Backbone, timesteps: Tensor) -> Tensor:
    """1 - cosine between quantised and full-precision temporal features: (S, projections) for time steps (S,).

    The papers' own diagnosis of what quantisation does to the time step.
    """
    announce_step(network, timesteps)
    features = backbone.temporal_features(network, timesteps)
    return _feature_errors(features, backbone.temporal_features(full, timesteps))


def _feature_errors(features: list[Tensor], targets: list[Tensor]) -> Tensor:
    errors = [1 - F.cosine_similarity(f.double(), t.double(), dim=1) for f, t in zip(features, targets, strict=True)]
    return torch.stack(errors, 1)
