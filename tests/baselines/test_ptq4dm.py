"""What PTQ4DM's rows are calibrated on."""

from __future__ import annotations

import pytest
import torch

from baselines import _ptq4dm, ptq4dm, ptq4dm_mispaired
from tests.tfmq import networks
from tfmq.network.calibration import CalibrationRows, normal_steps
from tfmq.passes.activation_ranges import ActivationRanges


def ranges_and_rows(method, pool) -> tuple[ActivationRanges, CalibrationRows]:
    """The one pass of the method that draws rows, and what it draws with its default settings."""
    generator = networks.generator()
    drawn = [(step, step.draw(pool, generator)) for step in method.config().recipe()]
    ((ranges, rows),) = [(step, rows) for step, rows in drawn if rows is not None]
    assert isinstance(ranges, ActivationRanges)
    return ranges, rows


def test_mispaired_rows_label_what_a_step_puts_out_with_its_count():
    """As recorded of the released code: label j gets x after j + 1 steps from the noisiest, and is the time step."""
    pool = networks.pool(networks.unconditional())
    rows = _ptq4dm.Mispaired(40, 0.4, 0.4)(pool, networks.generator())
    drawn = normal_steps(40, 0.4, 0.4, pool.steps, networks.generator())
    assert torch.equal(rows.timesteps, drawn) and drawn.max() == pool.steps - 1 and drawn.min() == 0
    states = [*pool.latents, pool.samples]  # before the first step, after the first, ..., after the last
    for row, label in enumerate(drawn.tolist()):
        assert torch.equal(rows.latents[row], states[label + 1][row % pool.images])


@pytest.mark.parametrize("method", [ptq4dm.METHOD, ptq4dm_mispaired.METHOD])
def test_the_draw_is_that_of_the_row(method):
    pool = networks.pool(networks.unconditional())
    ranges, rows = ranges_and_rows(method, pool)
    steps = rows.timesteps
    assert len(steps) == 1024 and ranges.momentum == 0.9
    assert not torch.equal(steps, ranges.data.rows_of(pool, networks.generator()).timesteps), "rows are shuffled"
    if method is ptq4dm.METHOD:  # sqrt(5 / 2) steps around 2 of 5, counted from the clean end
        drawn = pool.timesteps.flip(0)[normal_steps(1024, 0.4, 2.5**0.5 / 5, 5, networks.generator())]
        assert torch.equal(steps.sort().values, drawn.sort().values)
    else:
        assert set(steps.tolist()) == set(range(pool.steps))


@pytest.mark.parametrize("method", [ptq4dm.METHOD, ptq4dm_mispaired.METHOD])
def test_under_guidance_every_batch_holds_both_halves(method):
    kind = networks.KINDS["text"]
    pool = kind.pool(kind.build())
    ranges, rows = ranges_and_rows(method, pool)
    assert len(rows) == 2048 and ranges.batch == 256
    for batch in rows.batches(ranges.batch):
        unconditional = (batch.context == pool.unconditional[0]).all((1, 2)).float()
        assert 0.35 < unconditional.mean() < 0.65
