"""TFMQ-DM: keeping temporal features (Huang et al., CVPR 2024, arXiv 2311.16503).

The temporal information block is every layer whose input is the time step alone: the time-embedding network and the
projection in each residual block. With T sampling steps it only ever sees T inputs, so it is reconstructed on exactly
these (temporal-information-aware reconstruction) and each step gets activation ranges of its own (finite-set
calibration), at no cost when sampling.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tfmq.plan import activation_quantizers, announce_step
from tfmq.reconstruction import Effort, RoundingConfig, learn_rounding, random_batches, reconstruction_loss
from tfmq.unet import UNet, UNetLayout, temporal_features


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

    layers = [unet.get_submodule(path) for path in layout.temporal]
    batches = random_batches(len(timesteps), config.batch, config.iterations, generator)
    effort.optimizer_steps += len(learn_rounding(layers, loss, batches, config))


@torch.no_grad()
def calibrate_finite_set(unet: UNet, layout: UNetLayout) -> None:
    """Finite-set calibration: give each activation in the temporal block its min-max range at every time step.

    The steps are ``unet.step_tracker.steps``; at one step such an activation is one known vector, so its range is
    exact.
    """
    tracker = unet.step_tracker
    layers = [unet.get_submodule(path) for path in layout.temporal]
    quantizers = [quantizer for layer in layers for quantizer in activation_quantizers(layer).values()]
    for quantizer in quantizers:
        quantizer.observe(per_step=True)
    tracker.set(tracker.steps)
    temporal_features(unet, layout, tracker.steps.to(unet.device))
    for quantizer in quantizers:
        quantizer.freeze()


@torch.no_grad()
def temporal_feature_error(unet: UNet, full: UNet, layout: UNetLayout, timesteps: Tensor) -> Tensor:
    """1 - cosine between quantised and full-precision temporal features: (S, projections) for time steps (S,).

    The papers' own diagnosis of what quantisation does to the time step.
    """
    announce_step(unet, timesteps)
    features = temporal_features(unet, layout, timesteps)
    targets = temporal_features(full, layout, timesteps)
    errors = [1 - F.cosine_similarity(f.double(), t.double(), dim=1) for f, t in zip(features, targets, strict=True)]
    return torch.stack(errors, 1)
