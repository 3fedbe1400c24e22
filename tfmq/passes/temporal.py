"""TFMQ-DM: keeping temporal features (Huang et al., CVPR 2024, arXiv 2311.16503), and its successor's cache.

The temporal information block is every layer whose input is the time step alone: the time-embedding network and the
projection in each residual block. With T sampling steps it only ever sees T inputs, so it is reconstructed on exactly
these (temporal-information-aware reconstruction) and each step gets activation ranges of its own (finite-set
calibration), at no cost when sampling. Or its outputs are computed ahead and looked up (arXiv 2407.19547).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from tfmq.journal import Effort
from tfmq.modules.cache import CachedProjection, CachePlan, cached_projections, insert_cache
from tfmq.network.unet import UNet, UNetLayout, temporal_features
from tfmq.passes.reconstruction import RoundingConfig, learn_roundings, reconstruction_loss
from tfmq.plan import activation_quantizers, announce_step, quantized_layers


def reconstruct_temporal(
    unet: UNet,
    full: UNet,
    layout: UNetLayout,
    timesteps: Tensor,
    config: RoundingConfig,
    generator: torch.Generator,
    effort: Effort,
) -> None:
    """Temporal-information-aware reconstruction: learn the block's roundings jointly on the finite set of time steps.

    Minimises sum_i ||emb_{t,i} - emb_hat_{t,i}||^2 over the projections i for steps t drawn from ``timesteps`` (S,)
    (eq. 8 of the paper). The layers are folded afterwards.
    """
    with torch.no_grad():
        targets = temporal_features(full, layout, timesteps)

    def loss(index: Tensor) -> Tensor:
        features = temporal_features(unet, layout, timesteps[index])
        losses = [reconstruction_loss(f, t[index], config.norm) for f, t in zip(features, targets, strict=True)]
        return torch.stack(losses).sum()

    quantized = quantized_layers(unet)
    layers = {path: quantized[path] for path in layout.temporal if path in quantized}
    learn_roundings("weights-temporal", layers, loss, len(timesteps), config, generator, effort)


@torch.no_grad()
def calibrate_finite_set(unet: UNet, layout: UNetLayout) -> None:
    """Finite-set calibration: give each activation in the temporal block its min-max range at every time step.

    The steps are ``unet.step_tracker.steps``; at one step such an activation is one known vector, so its range is
    exact.
    """
    tracker = unet.step_tracker
    quantized = quantized_layers(unet)
    layers = [quantized[path] for path in layout.temporal if path in quantized]
    quantizers = [quantizer for layer in layers for quantizer in activation_quantizers(layer).values()]
    for quantizer in quantizers:
        quantizer.observe(per_step=True)
    tracker.set(tracker.steps)
    temporal_features(unet, layout, tracker.steps.to(unet.device))
    for quantizer in quantizers:
        quantizer.freeze()


Caching = Literal["all", "projection", "step"]


@torch.no_grad()
def cache_temporal_features(
    unet: UNet, full: UNet, layout: UNetLayout, bits: int, caching: Caching
) -> dict[str, object]:
    """Look temporal features up in tables of ``bits``-bit codes wherever that keeps them better than computing them.

    ``all``: everywhere. Else disturbance-aware selection, by the smaller temporal-feature error (see
    ``temporal_feature_error``) of the two: once for each ``projection``, by the mean over steps, or at each ``step`` of
    each projection. Ties are looked up. The steps are ``unet.step_tracker.steps``.

    Returns:
        ``projections`` (P paths), ``timesteps`` (S), ``cached`` (P lists of S booleans: looked up or not), and the two
        errors of each projection, mean over steps (``error_computed`` is missing under ``all``).
    """
    steps = unet.step_tracker.steps.to(unet.device)
    announce_step(unet, steps)
    targets = temporal_features(full, layout, steps)
    tables = []
    for path, target in zip(layout.time_projections, targets, strict=True):
        table = CachedProjection(full.get_submodule(path), CachePlan(bits, keeps_layer=False), unet.step_tracker)
        table.to(unet.device).store(target)
        tables.append(table)
    error = _feature_errors([table.features(unet.step_tracker.index) for table in tables], targets)
    details = {"projections": list(layout.time_projections), "timesteps": steps.tolist()}
    details["error_cached"] = error.mean(0).tolist()
    chosen = torch.ones_like(error, dtype=torch.bool)
    if caching != "all":
        computed = temporal_feature_error(unet, full, layout, steps)
        details["error_computed"] = computed.mean(0).tolist()
        by_projection = (error.mean(0) <= computed.mean(0)).expand_as(error)
        chosen = by_projection if caching == "projection" else error <= computed
    plans = {
        path: CachePlan(bits, keeps_layer=not bool(steps_chosen.all()))
        for path, steps_chosen in zip(layout.time_projections, chosen.T, strict=True)
        if steps_chosen.any()
    }
    insert_cache(unet, plans, layout.time_projections)
    columns = dict(zip(layout.time_projections, range(len(targets)), strict=True))
    for path, projection in cached_projections(unet).items():
        projection.store(targets[columns[path]])
        projection.looked_up = chosen[:, columns[path]].clone()
    return details | {"cached": chosen.T.tolist()}


@torch.no_grad()
def temporal_feature_error(unet: UNet, full: UNet, layout: UNetLayout, timesteps: Tensor) -> Tensor:
    """1 - cosine between quantised and full-precision temporal features: (S, projections) for time steps (S,).

    The papers' own diagnosis of what quantisation does to the time step.
    """
    announce_step(unet, timesteps)
    features = temporal_features(unet, layout, timesteps)
    return _feature_errors(features, temporal_features(full, layout, timesteps))


def _feature_errors(features: list[Tensor], targets: list[Tensor]) -> Tensor:
    errors = [1 - F.cosine_similarity(f.double(), t.double(), dim=1) for f, t in zip(features, targets, strict=True)]
    return torch.stack(errors, 1)
