"""What is particular to a family: its first stage, its prompts, and the stock pipeline that it stands for."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline

from benchmarks.models import class_ldm, ldm, stable_diffusion, stable_diffusion_xl
from benchmarks.models._latent import TINY_FIRST_STAGE
from benchmarks.runtime import manifest
from tfmq.network.sampling import SamplingSettings, sample

CPU = torch.device("cpu")
PROMPTS = ["red apple", "cat face with a smile that is far too long for the tiny tokenizer to keep all of it"]


def test_the_first_stage_of_an_ldm_may_be_a_kl_autoencoder(tmp_path):
    ldm.save_tiny(tmp_path, 0)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first_stage = AutoencoderKL(**TINY_FIRST_STAGE, latent_channels=3, scaling_factor=0.5).eval()
    first_stage.half().save_pretrained(tmp_path / "vqvae")
    manifest.write(tmp_path)
    latents = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        images = first_stage.float().decode(latents / 0.5).sample
    expected = (images / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
    assert torch.equal(ldm.load(tmp_path, CPU).decode(latents), expected)


def test_other_first_stages_are_named(tmp_path):
    ldm.save_tiny(tmp_path, 0)
    path = tmp_path / "vqvae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "AutoencoderTiny"}))
    manifest.write(tmp_path)
    with pytest.raises(ValueError, match="unknown first stage in .* 'AutoencoderTiny': .*Allowed: AutoencoderKL, VQ"):
        ldm.load(tmp_path, CPU)


def test_prompts_of_a_class_conditional_model_are_its_classes(tmp_path):
    class_ldm.save_tiny(tmp_path, 0)
    model = class_ldm.load(tmp_path, CPU)
    embedding = class_ldm.ClassEmbedding.from_pretrained(tmp_path / "class_embedding")
    found = model.conditioning(["square", "circle"])
    assert torch.equal(found.context[:, 0], embedding.weight[[1, 0]])
    assert torch.equal(found.unconditional[:, 0], embedding.weight[[2, 2]])
    with pytest.raises(ValueError, match="unknown class of .* 'squair': did you mean 'square'"):
        model.conditioning(["circle", "squair"])


@pytest.mark.parametrize(
    ("family", "stock", "options"),
    [
        (stable_diffusion, StableDiffusionPipeline, {"safety_checker": None}),
        (stable_diffusion_xl, StableDiffusionXLPipeline, {"add_watermarker": False}),
    ],
)
@torch.no_grad()
def test_the_stock_pipeline_gives_the_same_images(family, stock, options, tmp_path):
    family.save_tiny(tmp_path, 0)
    model = family.load(tmp_path, CPU)
    noise = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    settings = SamplingSettings(steps=6, guidance_scale=7.5)
    images = model.decode(
        sample(model.unet, model.scheduler, noise, settings, conditioning=model.conditioning(PROMPTS))
    )
    pipeline = stock.from_pretrained(tmp_path, **options)
    pipeline.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 6, "guidance_scale": 7.5, "height": 32, "width": 32, "output_type": "pt"}
    pipeline.vae_scale_factor = 4
    expected = pipeline(PROMPTS, latents=noise, **call).images
    difference = (images.float() / 255 - expected).abs()
    assert difference.max() <= 0.5 / 255 + 1e-5
    assert expected.std() > 0.05 and not torch.allclose(expected[0], expected[1], atol=0.1)
