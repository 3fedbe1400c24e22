"""PTQD's step-aware mixed precision: widths of activations that vary over time steps (arXiv 2305.10657).

Early in denoising the latents are mostly noise, and a coarse prediction does little harm. At each step the smallest
width is taken whose signal-to-quantisation-noise ratio is above the signal-to-noise ratio of the latents themselves.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tfmq.network.backbone import Network
from tfmq.plan import QuantizationPlan, activation_quantizers

Ranges = dict[str, tuple[int, Tensor, Tensor]]


def quantization_snr(noise: Tensor, predicted: Tensor, timesteps: Tensor) -> Tensor:
    """||eps|| / ||eps_hat - eps|| over all images of each time step, whether visited once or more: (S,), ascending.

    Args:
        noise, predicted: (visits, images, C, H, W).
        timesteps: (visits,), of which S are distinct.
    """
    distinct, where = timesteps.unique(return_inverse=True)

    def squared_norms(x: Tensor) -> Tensor:
        return x.new_zeros(len(distinct), dtype=torch.float64).index_add_(
            0, where, x.double().square().flatten(1).sum(1)
        )

    return (squared_norms(noise) / squared_norms(predicted - noise)).sqrt()


def forward_snr(alphas: Tensor) -> Tensor:
    """Signal-to-noise ratio of the latents, alpha_t^2 / sigma_t^2 = a / (1 - a) of the cumulative alphas."""
    return alphas / (1 - alphas)


def smallest_bits(snr: Mapping[int, Tensor], needed: Tensor, largest: int) -> Tensor:
    """The smallest width whose ratio (steps,) is above ``needed`` (steps,) at each step, else ``largest``: (steps,)."""
    chosen = torch.full(needed.shape, largest)
    for bits in sorted(snr, reverse=True):
        chosen = torch.where(snr[bits].to(needed) > needed, bits, chosen)
    return chosen


def set_bits(network: Network, plan: QuantizationPlan) -> None:
    """Give every activation quantiser the width that ``plan`` gives its layer or attention module."""
    for path, layer in plan.layers.items():
        for quantizer in activation_quantizers(network.get_submodule(path)).values():
            quantizer.bits = layer.activation_bits
    for path, attention in plan.attentions.items():
        processor = network.get_submodule(path).processor
        for quantizer in (processor.query, processor.key, processor.value):
            quantizer.bits = attention.activation_bits
        processor.probabilities.bits = attention.softmax_bits


def ranges_of(network: Network) -> Ranges:
    """Width, scale and zero point of every activation quantiser, by path."""
    return {path: (q.bits, q.scale, q.zero_point) for path, q in activation_quantizers(network).items()}


def mix_ranges(network: Network, at_bits: Mapping[int, Ranges], chosen: Tensor) -> None:
    """Give every quantiser, at each of ``network.step_tracker.steps``, its range at the ``chosen`` width (steps,)."""
    for path, quantizer in activation_quantizers(network).items():
        widths, scales, zero_points = zip(*(at_bits[bits][path] for bits in chosen.tolist()), strict=True)
        quantizer.mix_bits(torch.tensor(widths), torch.cat(scales), torch.cat(zero_points))
