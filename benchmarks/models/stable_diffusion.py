"""Text to image in the form of Stable Diffusion v1: CLIP's text tower, a UNet and a KL first stage.

The layout is that of diffusers' StableDiffusionPipeline, which reads the prompts here too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from benchmarks.models import Family, Model
from benchmarks.models._latent import TINY_FIRST_STAGE, TINY_UNET, decoder, tiny_scheduler
from benchmarks.runtime import manifest
from tfmq.network.sampling import Conditioning


def load(folder: Path, device: torch.device) -> Model:
    """Load the pipeline in ``folder`` as float32, after checking the files' hashes; no safety checker is kept.

    The context of a prompt is the text tower's last hidden state of all its tokens, padded and cut to the tokenizer's
    length; unconditional is that of the empty prompt.
    """
    manifest.verify(folder)
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()  # several a load, and each process of each stage loads the model
    pipeline = StableDiffusionPipeline.from_pretrained(
        folder, dtype=torch.float32, low_cpu_mem_usage=False, safety_checker=None, feature_extractor=None
    ).to(device)
    for network in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        network.eval().requires_grad_(False)

    def conditioning(prompts: Sequence[str]) -> Conditioning:
        context, unconditional = pipeline.encode_prompt(
            list(prompts), device, num_images_per_prompt=1, do_classifier_free_guidance=True
        )
        return Conditioning(context, unconditional)

    size = pipeline.unet.config.sample_size
    shape = (pipeline.unet.config.in_channels, size, size)
    return Model(pipeline.unet, pipeline.scheduler, shape, decoder(pipeline.vae), conditioning)


def save_tiny(folder: Path, seed: int) -> None:
    """Write a random pipeline of a few thousand parameters: images 32x32, latents 4x8x8, 12 tokens of 8 numbers."""
    # All bytes, each also at a word's end, and the two marks of a text's ends: no pairs.
    tokenizer = CLIPTokenizer(model_max_length=12).train_new_from_iterator([""], 514, show_progress=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=12,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        pipeline = StableDiffusionPipeline(
            vae=AutoencoderKL(**TINY_FIRST_STAGE, latent_channels=4, scaling_factor=0.5),
            text_encoder=CLIPTextModel(text),
            tokenizer=tokenizer,
            unet=UNet2DConditionModel(
                **TINY_UNET,
                in_channels=4,
                out_channels=4,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                cross_attention_dim=8,
                attention_head_dim=2,
            ),
            scheduler=PNDMScheduler.from_config(tiny_scheduler().config, skip_prk_steps=True),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(folder)
    manifest.write(folder)


FAMILY = Family(load, save_tiny)
