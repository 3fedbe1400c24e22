"""What PTQ4DM's rows are calibrated on."""

from __future__ import annotations

import pytest
import torch

from baselines import _ptq4dm, ptq4dm, ptq4dm_mispaired
from tests.tfmq import networks
from tfmq.network.calibration import normal_steps
from tfmq.precision import Precision
from tfmq.quantization import SHARED


def test_mispaired_rows_label_what_a_step_puts_out_with_its_count():
    """As recorded of the released code: label j gets x after j + 1 steps from the noisiest, and is the time step."""
    pool = networks.pool(networks.unconditional())
    rows = _ptq4dm.mispaired_rows(pool, 40, 0.4, 0.4, networks.generator())
    drawn = normal_steps(40, 0.4, 0.4, pool.steps, networks.generator())
    assert torch.equal(rows.timesteps, drawn) and drawn.max() == pool.steps - 1 and drawn.min() == 0
    states = [*pool.latents, pool.samples]  # before the first step, after the first, ..., after the last
    for row, label in enumerate(drawn.tolist()):
        assert torch.equal(rows.latents[row], states[label + 1][row % pool.images])


@pytest.mark.parametrize("method", [ptq4dm.METHOD, ptq4dm_mispaired.METHOD])
def test_the_draw_is_that_of_the_row(method, monkeypatch):
    seen = {}

    def record(unet, precision, setting, rows, activation_rows, *rest):
        seen.update(setting=setting, rows=activation_rows)

    monkeypatch.setattr(_ptq4dm, "quantize_", record)
    unet = networks.unconditional()
    pool = networks.pool(unet)
    method.quantize(unet, pool, Precision.parse("w8a8"), method.config(), networks.generator(), SHARED)
    steps = seen["rows"].timesteps
    assert len(steps) == 1024 and seen["setting"].activation_momentum == 0.9
    if method is ptq4dm.METHOD:  # sqrt(5 / 2) steps around 2 of 5, counted from the clean end
        drawn = pool.timesteps.flip(0)[normal_steps(1024, 0.4, 2.5**0.5 / 5, 5, networks.generator())]
        assert torch.equal(steps.sort().values, drawn.sort().values)
    else:
        assert set(steps.tolist()) == set(range(pool.steps))


@pytest.mark.parametrize("method", [ptq4dm.METHOD, ptq4dm_mispaired.METHOD])
def test_under_guidance_every_batch_holds_both_halves(method, monkeypatch):
    seen = []
    monkeypatch.setattr(_ptq4dm, "quantize_", lambda unet, precision, setting, rows, *rest: seen.append(rows))
    kind = networks.KINDS["text"]
    unet = kind.build()
    pool = kind.pool(unet)
    method.quantize(unet, pool, Precision.parse("w8a8"), method.config(), networks.generator(), SHARED)
    assert len(seen[0]) == 2048
    for batch in seen[0].batches(256):
        unconditional = (batch.context == pool.unconditional[0]).all((1, 2)).float()
        assert 0.35 < unconditional.mean() < 0.65
