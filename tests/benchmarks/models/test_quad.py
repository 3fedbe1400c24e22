"""DDIM's quadratic steps: which they are, and that each is the step of its equation."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler

from benchmarks.models._quad import QuadDDIMScheduler
from tests.tfmq import networks
from tfmq.network.calibration import collect_calibration
from tfmq.network.sampling import SamplingSettings, sample

CIFAR = {"beta_start": 0.0001, "beta_end": 0.02, "clip_sample": False}


def scheduler(**changes: object) -> QuadDDIMScheduler:
    return QuadDDIMScheduler.from_config(DDIMScheduler(**CIFAR | changes).config)


def test_the_time_steps_are_those_of_the_published_code():
    quad = scheduler()
    quad.set_timesteps(100)
    found = quad.timesteps.tolist()
    # As recorded from ermongroup/ddim with 100 steps.
    assert found[:4] == [800, 783, 768, 752] and found[-9:] == [5, 3, 2, 2, 1, 0, 0, 0, 0]
    assert len(found) == 100 and len(set(found)) == 96 and found == sorted(found, reverse=True)
    quad.set_timesteps(1)
    assert quad.timesteps.tolist() == [0]


def test_each_step_follows_the_equation():
    quad = scheduler()
    quad.set_timesteps(20)
    alphas = [*quad.alphas_cumprod[quad.timesteps].tolist(), 1.0]
    generator = torch.Generator().manual_seed(0)
    for index, timestep in enumerate(quad.timesteps):
        x, noise, new = torch.randn(3, 2, 3, 4, 4, generator=generator).unbind()
        alpha, after = alphas[index : index + 2]
        sigma = 0.7 * math.sqrt((1 - alpha / after) * (1 - after) / (1 - alpha))
        original = (x - math.sqrt(1 - alpha) * noise) / math.sqrt(alpha)
        expected = math.sqrt(after) * original + math.sqrt(1 - after - sigma**2) * noise + sigma * new
        found = quad.step(noise, timestep, x, eta=0.7, variance_noise=new)
        torch.testing.assert_close(found.prev_sample, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.pred_original_sample, original, rtol=1e-4, atol=1e-5)


def test_a_repeated_step_leaves_the_image_and_the_last_ends_at_the_prediction():
    quad = scheduler()
    quad.set_timesteps(100)
    x, noise = torch.randn(2, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0)).unbind()
    for timestep in quad.timesteps[:-4]:
        quad.step(noise, timestep, x)
    for _ in range(3):
        torch.testing.assert_close(quad.step(noise, 0, x).prev_sample, x, rtol=0, atol=1e-6)
    last = quad.step(noise, 0, x)
    assert torch.equal(last.prev_sample, last.pred_original_sample)


def test_steps_out_of_order_are_refused():
    quad = scheduler()
    quad.set_timesteps(4)
    x = torch.zeros(1, 3, 4, 4)
    with pytest.raises(ValueError, match="time step 1 is not the schedule's next: take its steps in order"):
        quad.step(x, 1, x)
    for timestep in quad.timesteps:
        quad.step(x, timestep, x)
    with pytest.raises(ValueError, match="is not the schedule's next"):
        quad.step(x, 0, x)


def test_noise_that_a_step_adds_has_to_be_given():
    quad = scheduler()
    quad.set_timesteps(4)
    x = torch.zeros(1, 3, 4, 4)
    with pytest.raises(ValueError, match="eta is 0.5: give variance_noise"):
        quad.step(x, quad.timesteps[0], x, eta=0.5)


@pytest.mark.parametrize("changes", [{"clip_sample": True}, {"prediction_type": "sample"}, {"thresholding": True}])
def test_models_that_it_is_not_for_are_refused(changes):
    with pytest.raises(ValueError, match="take the scheduler ddim"):
        scheduler(**changes).set_timesteps(4)


def test_the_pool_has_a_repeated_step_as_often_as_it_comes():
    unet, noise, settings = networks.unconditional(), networks.noise(2), SamplingSettings(40)
    pool = collect_calibration(unet, scheduler(), noise, settings, batch=2)
    assert pool.timesteps.tolist()[-3:] == [2, 0, 0]
    torch.testing.assert_close(pool.latents[-1], pool.latents[-2], rtol=0, atol=1e-5)
    assert pool.alphas[-2] == pool.alphas[-3] < pool.alphas[-1] == 1
    assert torch.equal(pool.samples, sample(unet, scheduler(), noise, settings))
