"""Quantising without calibration data, to measure what an exported network costs and not what it predicts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tfmq.network.backbone import Network, backbone_of, evaluate
from tfmq.passes.deployable import Deployable, take_symmetric_weights
from tfmq.plan import activation_quantizers, insert_quantizers, plan_for, quantized_layers
from tfmq.precision import Precision
from tfmq.quantization import check_arguments


@torch.no_grad()
def quantize_roughly_(
    network: Network,
    precision: Precision,
    timesteps: Sequence[int],
    side: int | None = None,
    tokens: int = 77,
) -> None:
    """Quantise ``network`` in place in seconds: min-max ranges of the weights, and of activations on one random row.

    It has the kernels, the size and the speed of a calibrated network on grids that can be executed
    (`tfmq.passes.deployable`), and no quality. No copy of the network is made, and none is kept if this fails.

    Args:
        timesteps: that it is going to be sampled at.
        side: of the random latents; None for the network's own. Small ones are faster.
        tokens: of the random context, where the network takes one.

    Raises:
        ValueError: the network is quantised already, holds NaN or infinity, or the precision leaves its weights or
            activations in full precision.
    """
    check_arguments(network, precision, None)
    if not precision.quantizes_activations:
        raise ValueError(f"precision {precision} leaves activations in full precision: nothing executes in integers")
    backbone = backbone_of(network)
    network.eval().requires_grad_(False)
    plan = Deployable().amend(plan_for(network, backbone, precision), network, backbone)
    tracker = insert_quantizers(network, plan)
    tracker.steps = torch.as_tensor(list(timesteps), dtype=torch.int64).unique()
    take_symmetric_weights(network)
    for layer in quantized_layers(network).values():
        layer.find_weight_range("minmax")
        layer.fold()
    quantizers = activation_quantizers(network).values()
    for quantizer in quantizers:
        quantizer.observe()
    generator = torch.Generator().manual_seed(0)
    side = side or network.config.sample_size
    latents = torch.randn(1, network.config.in_channels, side, side, generator=generator)
    condition = backbone.random_condition(network, 1, tokens, network.device)
    evaluate(network, latents.to(network.device), tracker.steps[-1:].to(network.device), condition)
    for quantizer in quantizers:
        quantizer.freeze()
