"""Learning roundings block by block in a whole network, and where its rows wait."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.tfmq import networks
from tfmq.network.backbone import backbone_of
from tfmq.network.offload import BlockStream, Place
from tfmq.passes.reconstruction import RoundingConfig, StepSizeConfig
from tfmq.precision import Precision
from tfmq.quantization import quantize_
from tfmq.workspace import Workspace

ROUNDING = RoundingConfig(iterations=4, batch=8, learning_rate=1e-2)


@torch.no_grad()
def test_reconstruction_brings_the_output_closer_to_full_precision():
    nearest, full, pool, _ = networks.quantized(networks.recipe(), "w4a32")
    rounding = RoundingConfig(iterations=60, batch=8, learning_rate=2e-2)
    learned = networks.quantized(networks.recipe(rounding=rounding), "w4a32")[0]
    rows = pool.spaced(5, 4)
    target = full(rows.latents, rows.timesteps).sample
    before, after = ((unet(rows.latents, rows.timesteps).sample - target).norm() for unet in (nearest, learned))
    assert after < before


@torch.no_grad()
def test_streaming_gives_what_the_whole_network_gives():
    unet, full, pool, _ = networks.quantized(networks.recipe(scales="per_step"))
    backbone, rows = backbone_of(full), pool.spaced(5, 4).shuffled(networks.generator())
    for network in (full, unet):
        stream = BlockStream(network, backbone, rows, 6, Place(network.device))
        for block in backbone.blocks:
            stream.advance(block, stream.outputs(block, stream.inputs(block)))
        expected = network(rows.latents, rows.timesteps).sample
        torch.testing.assert_close(stream.hidden, expected, rtol=1e-4, atol=1e-4)


def test_the_byte_budget_is_kept_or_refused_with_the_row_count_that_fits():
    with pytest.raises(
        ValueError, match=r"20 calibration rows need .* use at most [1-9]\d* rows or raise memory_bytes"
    ):
        networks.quantized(networks.recipe(rounding=ROUNDING, memory_bytes=100_000))
    message = (
        r"20 calibration rows need [\d,]+ bytes .*, one row [\d,]+, and memory_bytes allows 10: raise memory_bytes, "
        "or give a workspace that lets rows wait on a disk"
    )
    for learned in ({"rounding": ROUNDING}, {"step_sizes": StepSizeConfig(iterations=2)}):
        with pytest.raises(ValueError, match=message):
            networks.quantized(networks.recipe(**learned, memory_bytes=10))


@pytest.mark.parametrize("kind", ["unconditional", "text"])
def test_rows_that_do_not_fit_wait_elsewhere_and_nothing_else_changes(kind):
    kind = networks.KINDS[kind]
    recipe = networks.recipe(rounding=ROUNDING, step_sizes=StepSizeConfig(iterations=2, batch=8), batch=6)
    small = tuple(replace(step, memory_bytes=10) if hasattr(step, "memory_bytes") else step for step in recipe)
    allocated = []

    def allocate(elements: int, dtype: torch.dtype) -> torch.Tensor:
        allocated.append(elements)
        return torch.full((elements,), torch.nan, dtype=dtype)

    elsewhere = Workspace()
    elsewhere.allocate = allocate
    pool = kind.pool(kind.build())
    states = []
    for passes, workspace in ((recipe, None), (small, elsewhere)):
        assert not allocated
        unet = kind.build()
        quantize_(unet, Precision.parse("w4a8"), passes, pool, networks.generator(), workspace=workspace)
        states.append(unet.state_dict())
    first, second = states
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert allocated
