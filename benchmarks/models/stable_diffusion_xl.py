"""Text to image in the form of Stable Diffusion XL: two text towers, a UNet and a KL first stage; no refiner.

The layout is that of diffusers' StableDiffusionXLPipeline, which reads the prompts here too. Images have no watermark.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from benchmarks.models import Family, Model
from benchmarks.models._latent import TINY_FIRST_STAGE, TINY_UNET, decoder, tiny_scheduler
from benchmarks.runtime import manifest
from tfmq.network.conditioning import TEXT_EMBEDS, TIME_IDS
from tfmq.network.sampling import Conditioning


def load(folder: Path, device: torch.device) -> Model:
    """Load the pipeline in ``folder`` as float32, after checking the files' hashes.

    The context of a prompt is the last hidden state but one of both text towers, side by side. Besides it go the pooled
    text of the second tower, and that the original and the target are as large as the image, which is not cropped.
    Unconditional is no text at all, zeros, where the pipeline's settings say so, and else that of the empty prompt.
    """
    manifest.verify(folder)
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()  # several a load, and each process of each stage loads the model
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        folder, dtype=torch.float32, low_cpu_mem_usage=False, add_watermarker=False
    ).to(device)
    for network in (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        network.eval().requires_grad_(False)
    size = pipeline.unet.config.sample_size
    side = size * pipeline.vae_scale_factor

    def conditioning(prompts: Sequence[str]) -> Conditioning:
        context, unconditional, pooled, unconditional_pooled = pipeline.encode_prompt(
            list(prompts), device=device, num_images_per_prompt=1, do_classifier_free_guidance=True
        )
        sizes = torch.tensor([side, side, 0, 0, side, side], dtype=torch.float32, device=device).repeat(len(prompts), 1)
        inputs = {TEXT_EMBEDS: pooled, TIME_IDS: sizes}
        return Conditioning(context, unconditional, inputs, {TEXT_EMBEDS: unconditional_pooled})

    shape = (pipeline.unet.config.in_channels, size, size)
    return Model(pipeline.unet, pipeline.scheduler, shape, decoder(pipeline.vae), conditioning)


def save_tiny(folder: Path, seed: int) -> None:
    """Write a random pipeline of a few thousand parameters: images 32x32, latents 4x8x8, 12 tokens of 8 + 8 numbers."""
    # All bytes, each also at a word's end, and the two marks of a text's ends: no pairs.
    tokenizer = CLIPTokenizer(model_max_length=12).train_new_from_iterator([""], 514, show_progress=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=12,
            projection_dim=6,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        pipeline = StableDiffusionXLPipeline(
            vae=AutoencoderKL(**TINY_FIRST_STAGE, latent_channels=4, scaling_factor=0.5),
            text_encoder=CLIPTextModel(text),
            text_encoder_2=CLIPTextModelWithProjection(text),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            unet=UNet2DConditionModel(
                **TINY_UNET,
                in_channels=4,
                out_channels=4,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                cross_attention_dim=16,
                attention_head_dim=(1, 2),
                transformer_layers_per_block=(1, 2),
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=4,
                projection_class_embeddings_input_dim=6 + 6 * 4,
            ),
            scheduler=EulerDiscreteScheduler.from_config(tiny_scheduler().config, timestep_spacing="leading"),
            add_watermarker=False,
        )
    pipeline.save_pretrained(folder)
    manifest.write(folder)


FAMILY = Family(load, save_tiny)
