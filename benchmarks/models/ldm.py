"""Unconditional latent diffusion (LDM): a VQ or KL first stage and a UNet2DModel, in the layout of LDMPipeline."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from diffusers import DDIMScheduler, LDMPipeline, UNet2DModel

from benchmarks.models import Family, Model
from benchmarks.models._latent import TINY_UNET, decoder, load_first_stage, tiny_scheduler, tiny_vq
from benchmarks.runtime import manifest
from tfmq.network.attention_heads import restore_attention_heads

# Diffusers warns that it does not know the entry of a config from which tfmq restores an attention's heads.
logging.getLogger("diffusers.configuration_utils").addFilter(
    lambda record: "'attention_heads'" not in record.getMessage()
)


def load(folder: Path, device: torch.device) -> Model:
    """Load ``unet/``, ``vqvae/`` and ``scheduler/`` of ``folder`` as float32, after checking the files' hashes."""
    manifest.verify(folder)
    unet = UNet2DModel.from_pretrained(folder / "unet", low_cpu_mem_usage=False)
    first_stage = load_first_stage(folder / "vqvae")
    restore_attention_heads(unet)
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    for network in (unet, first_stage):
        network.eval().requires_grad_(False).to(device)
    size = unet.config.sample_size
    return Model(unet, scheduler, (unet.config.in_channels, size, size), decoder(first_stage))


def save_tiny(folder: Path, seed: int) -> None:
    """Write a random LDM of a few thousand parameters: images 32x32, latents 3x8x8."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DModel(
            **TINY_UNET,
            in_channels=3,
            out_channels=3,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=16,
        )
        first_stage = tiny_vq()
    LDMPipeline(first_stage, unet, tiny_scheduler()).save_pretrained(folder)
    manifest.write(folder)


FAMILY = Family(load, save_tiny)
