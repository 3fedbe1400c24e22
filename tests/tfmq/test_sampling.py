"""The one denoising loop against the stock pipelines and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import LDMPipeline, PNDMScheduler, VQModel

from tests.tfmq import networks
from tfmq.calibration import collect_calibration
from tfmq.precision import Precision
from tfmq.quantization import QuantizationConfig, quantize_
from tfmq.sampling import Conditioning, SamplingSettings, sample


def first_stage() -> VQModel:
    torch.manual_seed(3)
    return VQModel(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=3,
        num_vq_embeddings=16,
        norm_num_groups=4,
        scaling_factor=0.7,
    ).eval()


@pytest.mark.parametrize("quantized", [False, True])
@torch.no_grad()
def test_the_stock_pipeline_gives_the_same_images(quantized):
    unet = networks.unconditional()
    if quantized:
        pool = networks.pool(unet)
        rows = pool.spaced(5, 4)
        config = QuantizationConfig(activation_scales="temporal")
        quantize_(unet, Precision.parse("w4a8"), config, rows, rows, pool.timesteps, networks.generator())
    decoder = first_stage()
    pipeline = LDMPipeline(vqvae=decoder, unet=unet, scheduler=networks.scheduler())
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=4, generator=networks.generator(), num_inference_steps=5, output_type="np").images
    start = torch.randn(4, 3, 8, 8, generator=networks.generator())
    latents = sample(unet, networks.scheduler(), start, networks.SETTINGS)
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
    scheduler = PNDMScheduler(skip_prk_steps=True, steps_offset=1)
    pool = collect_calibration(networks.unconditional(), scheduler, networks.noise(2), networks.SETTINGS, batch=2)
    assert pool.steps == 6 and len(pool.timesteps.unique()) == 5


def test_pool_rows_are_the_trajectory():
    unet = networks.unconditional()
    pool = networks.pool(unet)
    seen = []
    sample(unet, networks.scheduler(), networks.noise(), networks.SETTINGS, callback=seen.append)
    rows = pool.spaced(steps=2, images=3)
    assert rows.timesteps.tolist() == [seen[0].timestep] * 3 + [seen[2].timestep] * 3
    assert torch.equal(rows.latents, torch.cat([seen[0].latents[:3], seen[2].latents[:3]]))


def test_nan_names_layer_and_step():
    unet = networks.unconditional()
    with torch.no_grad():
        unet.mid_block.resnets[0].conv1.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"mid_block\.resnets\.0\.conv1 put out NaN or infinity at step 0"):
        sample(unet, networks.scheduler(), networks.noise(), networks.SETTINGS)
