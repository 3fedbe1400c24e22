"""GPTQ as it was published: weights change and nothing else does, to outputs nearer than round-to-nearest's."""

from __future__ import annotations

import torch

from baselines import gptq, nearest
from tests.tfmq import networks
from tfmq.network.backbone import evaluate
from tfmq.plan import quantized_layers


@torch.no_grad()
def error(network, full) -> float:
    latents, step = networks.noise(4), torch.tensor(401)
    expected = evaluate(full, latents, step)
    return ((evaluate(network, latents, step) - expected).norm() / expected.norm()).item()


def test_it_is_nearer_than_rounding_to_nearest_and_leaves_biases_alone():
    network, full, pool, report = networks.quantized(gptq.Config(steps=5, images=4).recipe(), "w4a32")
    other, *_ = networks.quantized(nearest.Config(steps=5, images=4).recipe(), "w4a32", recorded=pool)
    assert error(network, full) < 0.9 * error(other, full)
    for path, layer in quantized_layers(network).items():
        given, nearest_layer = full.get_submodule(path), quantized_layers(other)[path]
        assert layer.bias is None or torch.equal(layer.bias, given.bias)
        assert torch.equal(layer.weight_scale, nearest_layer.weight_scale), "ranges are min-max"
    assert report.passes[0].unet_evaluations == 2 * 20, "full precision is not evaluated"
