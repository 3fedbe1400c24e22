"""Rows with scales per step: each step's range is the running average over batches of that step alone."""

from __future__ import annotations

import pytest
import torch

from baselines import qdiffusion_per_step, tfmq_per_step
from tests.tfmq import networks
from tfmq.numerics.affine import affine_from_range
from tfmq.plan import activation_quantizers
from tfmq.precision import Precision
from tfmq.quantization import quantize_


@pytest.mark.parametrize("method", [tfmq_per_step.METHOD, qdiffusion_per_step.METHOD])
@pytest.mark.parametrize("kind", networks.KINDS)
def test_a_step_s_range_is_the_running_average_of_its_own_batches(method, kind):
    """At the first layer, whose input is the latents: batches of 16 rows of the step, the last one smaller."""
    kind = networks.KINDS[kind]
    unet = kind.build()
    pool = kind.pool(unet, 20)
    config = method.config(iterations=1, temporal_iterations=1, steps=1, images=1)
    quantize_(unet, Precision.parse("w4a8"), config.recipe(), pool, networks.generator())
    quantizer = activation_quantizers(unet)["conv_in.input_quantizer"]
    rows = pool.spaced(pool.steps, 20).shuffled(networks.generator())
    lows, highs = [], []
    for timestep in pool.timesteps.unique():
        batches = rows.latents[rows.timesteps == timestep].split(16)
        low, high = batches[0].min(), batches[0].max()
        for batch in batches[1:]:
            low, high = 0.95 * low + 0.05 * batch.min(), 0.95 * high + 0.05 * batch.max()
        lows.append(low)
        highs.append(high)
    scale, zero_point = affine_from_range(torch.stack(lows), torch.stack(highs), 8)
    torch.testing.assert_close(quantizer.scale, scale)
    assert torch.equal(quantizer.zero_point, zero_point)
