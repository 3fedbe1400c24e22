"""Rows drawn from the pool."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.tfmq import networks
from tests.tfmq.oracle import each, tensors
from tfmq.network.calibration import CalibrationRows, CalibrationSet, collect_calibration, cut_to_steps, normal_steps
from tfmq.network.sampling import SamplingSettings

DRAW = "08_timestep_draw"


def numbered_pool(steps: int, images: int, guided: bool = False) -> CalibrationSet:
    """Latents hold 100 step + image, contexts the image, unconditional contexts its negative."""
    number = 100 * torch.arange(steps)[:, None] + torch.arange(images)
    latents = number.float()[:, :, None, None, None].expand(-1, -1, 1, 2, 2)
    context = torch.arange(images).float()[:, None, None] + 1
    alphas = torch.linspace(0.1, 1, steps + 1, dtype=torch.float64)
    timesteps = 1 + 50 * torch.arange(steps).flip(0)
    extra = {"context": context, "unconditional": -context} if guided else {}
    return CalibrationSet(latents, timesteps, latents, latents[0], alphas, SamplingSettings(steps), **extra)


def test_rows_of_a_guided_pool_hold_both_halves():
    pool = numbered_pool(4, 3, guided=True)
    steps, images = torch.tensor([3, 0]), torch.tensor([1, 2])
    rows = pool.rows(steps, images)
    assert rows.latents[:, 0, 0, 0].tolist() == [301, 2, 301, 2]
    assert rows.timesteps.tolist() == [1, 151, 1, 151]
    assert rows.context[:, 0, 0].tolist() == [2, 3, -2, -3]


def test_batches_of_steps_are_of_one_step_each_and_in_order():
    pool = numbered_pool(4, 5, guided=True)
    pool = dataclasses.replace(pool, timesteps=torch.tensor([151, 101, 101, 1]))  # as PNDM repeats one
    rows = pool.spaced(4, 5).shuffled(networks.generator())
    batches = list(rows.batches_of_steps(4))
    assert [len(batch) for batch in batches] == [4, 4, 2, 4, 4, 4, 4, 4, 4, 4, 2]
    for timestep in (1, 101, 151):
        own = [batch for batch in batches if timestep in batch.timesteps]
        assert all((batch.timesteps == timestep).all() for batch in own)
        for name in ("latents", "context"):
            kept = torch.cat([getattr(batch, name) for batch in own])
            assert torch.equal(kept, getattr(rows, name)[rows.timesteps == timestep])
    assert torch.equal(torch.cat([batch.latents for batch in rows.batches(7)]), rows.latents)


def test_a_repeated_time_step_is_spaced_as_one_and_gives_the_rows_of_both_visits():
    pool = dataclasses.replace(numbered_pool(5, 3), timesteps=torch.tensor([601, 401, 401, 201, 1]))
    for steps, expected in ((4, [0, 1, 2, 3, 4]), (9, [0, 1, 2, 3, 4]), (2, [0, 3])):
        rows = pool.spaced(steps, 2)
        visits = [100 * visit + image for visit in expected for image in range(2)]
        assert rows.latents[:, 0, 0, 0].tolist() == visits, "the cleanest step has to be among all"
        assert torch.equal(rows.timesteps, pool.timesteps[expected].repeat_interleave(2))
    among = torch.tensor([1, 401])
    assert pool.spaced(2, 1, among).timesteps.tolist() == [401, 401, 1]
    assert pool.spaced(1, 1, among).timesteps.tolist() == [401, 401]


@each(DRAW, r"T(?P<steps>\d+)\.(?P<kind>\w+)\.small\.t")
def test_numbers_become_the_published_steps(match):
    values = tensors(DRAW)
    numbers = values[match[0][:-1] + "v"]
    assert torch.equal(cut_to_steps(numbers, int(match["steps"])), values[match[0]])


@each(DRAW, r"T(?P<steps>\d+)\.(?P<kind>\w+)\.hist")
def test_steps_are_drawn_from_the_published_distribution(match):
    values, steps = tensors(DRAW), int(match["steps"])
    count = int(values[match[0]].sum())
    prefix = match[0].removesuffix("hist")
    mean, deviation = values[prefix + "mean_std"].tolist()
    drawn = normal_steps(count, mean, deviation, steps, networks.generator())
    expected = values[prefix + "probability"].double() * count
    counts = torch.bincount(drawn, minlength=steps).double()
    kept = expected >= 5
    chi_square = ((counts - expected)[kept].square() / expected[kept]).sum().item()
    freedom = int(kept.sum()) - 1
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5
    quantiles = torch.quantile(drawn.double(), values["quantile_levels"].double())
    assert (quantiles - values[prefix + "quantiles"]).abs().max() <= max(1, 0.01 * steps)
    moments = torch.stack([drawn.double().mean(), drawn.double().std(), counts[0] / count, counts[-1] / count])
    recorded = values[prefix + "moments"].double()
    torch.testing.assert_close(moments[:2], recorded[:2], rtol=0.01, atol=0)
    torch.testing.assert_close(moments[2:], recorded[2:], rtol=0, atol=0.005)


def test_normal_rows_pair_latents_with_their_own_step():
    pool = numbered_pool(20, 7)
    rows = pool.normal(1000, mean=0.4, deviation=0.16, generator=networks.generator())
    position, image = (rows.latents[:, 0, 0, 0] / 100).long(), (rows.latents[:, 0, 0, 0] % 100).long()
    assert torch.equal(rows.timesteps, pool.timesteps[position])
    assert torch.equal(image, torch.arange(1000) % 7)
    share = (19 - position).double() / 20
    assert share.mean() == pytest.approx(0.4 - 0.025, abs=0.02)  # cutting takes half a step off
    assert share.std() == pytest.approx(0.16, abs=0.02)


def test_an_empty_pool_is_refused():
    given = (networks.unconditional(), networks.scheduler())
    with pytest.raises(ValueError, match=r"noise of shape \(0, 3, 8, 8\) holds no image: give at least one"):
        collect_calibration(*given, networks.noise()[:0], networks.SETTINGS, batch=4)
    for batch in (0, -1):
        with pytest.raises(ValueError, match=f"batch is {batch}: it must be at least 1"):
            collect_calibration(*given, networks.noise(), networks.SETTINGS, batch=batch)


def test_rows_have_one_length():
    with pytest.raises(ValueError, match="calibration rows of 4 latents, 3 timesteps: give as many of each"):
        CalibrationRows(networks.noise(4), torch.arange(3))
    with pytest.raises(ValueError, match="4 latents, 4 timesteps, 2 context"):
        CalibrationRows(networks.noise(4), torch.arange(4), torch.zeros(2, 5, 12))
