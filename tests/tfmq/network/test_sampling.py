"""The one denoising loop against the stock pipelines and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LDMPipeline,
)

from tests.tfmq import networks
from tfmq.network.calibration import CalibrationSet, collect_calibration, cumulative_alphas
from tfmq.network.sampling import Conditioning, SamplingSettings, predict_noise, sample


@pytest.mark.parametrize("scheduler", [networks.scheduler, networks.pndm])
@pytest.mark.parametrize("quantized", [False, True])
@torch.no_grad()
def test_the_stock_pipeline_gives_the_same_images(quantized, scheduler):
    unet = networks.unconditional()
    if quantized:
        unet = networks.quantized(networks.recipe(scales="temporal"))[0]
    decoder = networks.first_stage()
    pipeline = LDMPipeline(vqvae=decoder, unet=unet, scheduler=scheduler())
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=4, generator=networks.generator(), num_inference_steps=5, output_type="np").images
    start = torch.randn(4, 3, 8, 8, generator=networks.generator())
    latents = sample(unet, scheduler(), start, networks.SETTINGS)
    own = (decoder.decode(latents / 0.7).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(own, images, atol=1e-6)


def test_guidance_combines_both_halves():
    unet, context = networks.conditional(), torch.randn(2, 5, 12, generator=networks.generator())
    conditioning = Conditioning(context, torch.zeros_like(context))
    seen = []
    settings = SamplingSettings(steps=1, guidance_scale=3.0)
    sample(unet, networks.scheduler(), networks.noise(2), settings, conditioning=conditioning, callback=seen.append)
    with torch.no_grad():
        unconditional = unet(seen[0].latents, seen[0].timestep, torch.zeros_like(context)).sample
        conditional = unet(seen[0].latents, seen[0].timestep, context).sample
    torch.testing.assert_close(seen[0].noise, unconditional + 3 * (conditional - unconditional), rtol=1e-4, atol=1e-4)


def test_step_noise_is_added_and_needed_for_eta():
    unet, settings = networks.unconditional(), SamplingSettings(steps=3, eta=1.0)
    with pytest.raises(ValueError, match="eta > 0 needs step_noise"):
        sample(unet, networks.scheduler(), networks.noise(), settings)
    quiet = sample(unet, networks.scheduler(), networks.noise(), settings, step_noise=torch.zeros(3, 4, 3, 8, 8))
    noisy = sample(unet, networks.scheduler(), networks.noise(), settings, step_noise=torch.ones(3, 4, 3, 8, 8))
    assert not torch.allclose(quiet, noisy)


def test_a_schedule_that_repeats_steps_is_recorded_step_by_step():
    pool = collect_calibration(networks.unconditional(), networks.pndm(), networks.noise(2), networks.SETTINGS, batch=2)
    assert pool.steps == 6 and len(pool.timesteps.unique()) == 5
    alphas = networks.scheduler().alphas_cumprod
    assert torch.equal(pool.alphas, torch.cat([alphas[pool.timesteps], alphas[:1]]).double())


def test_a_scheduler_without_eta_is_not_given_one():
    with pytest.raises(ValueError, match=r"PNDMScheduler takes no eta, and eta is 0\.5"):
        settings = SamplingSettings(steps=3, eta=0.5)
        sample(networks.unconditional(), networks.pndm(), networks.noise(), settings)


def test_a_pool_without_guidance_keeps_no_unconditional_half():
    kind = networks.KINDS["class"]
    unet = kind.build()
    conditioning = kind.conditioning(2)
    pool = collect_calibration(
        unet, networks.scheduler(), networks.noise(2), networks.SETTINGS, batch=2, conditioning=conditioning
    )
    assert pool.unconditional is None and torch.equal(pool.context, conditioning.context)
    assert len(pool.spaced(5, 2)) == 10 and len(kind.pool(unet, 2).spaced(5, 2)) == 20


def test_pool_rows_are_the_trajectory():
    unet = networks.unconditional()
    pool = networks.pool(unet)
    seen = []
    sample(unet, networks.scheduler(), networks.noise(), networks.SETTINGS, callback=seen.append)
    rows = pool.spaced(steps=2, images=3)
    assert rows.timesteps.tolist() == [seen[0].timestep] * 3 + [seen[2].timestep] * 3
    assert torch.equal(rows.latents, torch.cat([seen[0].latents[:3], seen[2].latents[:3]]))


def test_the_pool_holds_predictions_and_samples_of_the_trajectory():
    unet, scheduler, settings = networks.unconditional(), networks.scheduler(), SamplingSettings(steps=4, eta=1.0)
    noise, step_noise = networks.noise(3), torch.randn(4, 3, 3, 8, 8, generator=networks.generator())
    pool = collect_calibration(unet, scheduler, noise, settings, batch=2, step_noise=step_noise)
    seen = []
    final = sample(unet, scheduler, noise, settings, step_noise=step_noise, callback=seen.append)
    torch.testing.assert_close(pool.noise, torch.stack([step.noise for step in seen]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pool.samples, final, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        again = unet(pool.latents[2], pool.timesteps[2]).sample
    torch.testing.assert_close(again, pool.noise[2], rtol=1e-4, atol=1e-4)
    assert CalibrationSet(**pool.tensors, settings=settings).tensors.keys() == pool.tensors.keys()


def test_alphas_are_the_schedule_s_own():
    """Each step's alpha and the last one's follow-up are those a DDIM step uses: e = 0 gives sqrt(a'/a) x."""
    scheduler = networks.scheduler()
    scheduler.set_timesteps(5)
    alphas = cumulative_alphas(scheduler, scheduler.timesteps)
    x = torch.ones(1)
    for index, timestep in enumerate(scheduler.timesteps):
        step = scheduler.step(torch.zeros(1), timestep, x).prev_sample
        torch.testing.assert_close(step.double(), (alphas[index + 1] / alphas[index]).sqrt()[None], rtol=1e-6, atol=0)
    assert alphas[-1] == scheduler.alphas_cumprod[0].double() and alphas.dtype == torch.float64
    assert cumulative_alphas(DDIMScheduler(set_alpha_to_one=True), torch.tensor([1]))[-1] == 1
    assert cumulative_alphas(EulerDiscreteScheduler(), torch.tensor([1]))[-1] == 1
    with pytest.raises(ValueError, match="has no cumulative alphas"):
        cumulative_alphas(FlowMatchEulerDiscreteScheduler(), torch.tensor([1]))


def test_the_correction_sees_guided_noise_and_sets_noise_and_eta():
    unet, context = networks.conditional(), torch.randn(2, 5, 12, generator=networks.generator())
    conditioning = Conditioning(context, torch.zeros_like(context))
    settings, noise = SamplingSettings(steps=3, eta=1.0, guidance_scale=3.0), networks.noise(2)
    step_noise, seen, calls = torch.randn(3, 2, 3, 8, 8, generator=networks.generator()), [], []

    def correction(timestep, predicted, eta):
        calls.append((timestep, predicted, eta))
        return predicted / 2, 0.5

    final = sample(
        unet,
        networks.scheduler(),
        noise,
        settings,
        conditioning=conditioning,
        step_noise=step_noise,
        callback=seen.append,
        correction=correction,
    )
    scheduler, latents = networks.scheduler(), noise
    scheduler.set_timesteps(3)
    for index, timestep in enumerate(scheduler.timesteps):
        with torch.no_grad():
            off = unet(latents, timestep, torch.zeros_like(context)).sample
            guided = off + 3 * (unet(latents, timestep, context).sample - off)
        torch.testing.assert_close(calls[index][1], guided, rtol=1e-3, atol=1e-4)
        assert calls[index][0] == timestep and calls[index][2] == 1.0
        torch.testing.assert_close(seen[index].noise, guided / 2, rtol=1e-3, atol=1e-4)
        step = scheduler.step(guided / 2, timestep, latents, eta=0.5, variance_noise=step_noise[index])
        latents = step.prev_sample
    torch.testing.assert_close(final, latents, rtol=1e-3, atol=1e-3)


def test_nan_names_layer_and_step():
    unet = networks.unconditional()
    with torch.no_grad():
        unet.mid_block.resnets[0].conv1.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"mid_block\.resnets\.0\.conv1 put out NaN or infinity at step 0"):
        sample(unet, networks.scheduler(), networks.noise(), networks.SETTINGS)


@pytest.mark.parametrize("half", [True, False])
def test_guidance_without_both_halves_is_refused(half):
    unet, context = networks.conditional(), torch.randn(2, 5, 12, generator=networks.generator())
    conditioning = Conditioning(context) if half else None
    lacks = "no unconditional half of the conditioning" if half else "no conditioning"
    with pytest.raises(ValueError, match=rf"guidance_scale is 7\.5, but there is {lacks}: give a Conditioning"):
        settings = SamplingSettings(steps=5, guidance_scale=7.5)
        sample(unet, networks.scheduler(), networks.noise(2), settings, conditioning=conditioning)
    with pytest.raises(ValueError, match=lacks):
        predict_noise(unet, networks.noise(2), torch.tensor(1), conditioning, 7.5)
