"""Unconditional latent diffusion (LDM): a VQ first stage and a UNet2DModel, in the layout of diffusers' LDMPipeline."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DDIMScheduler, LDMPipeline, UNet2DModel, VQModel
from torch import Tensor

from benchmarks import manifest
from benchmarks.models import Family, Model


def load(folder: Path, device: torch.device) -> Model:
    """Load ``unet/``, ``vqvae/`` and ``scheduler/`` of ``folder`` as float32, after checking the files' hashes."""
    manifest.verify(folder)
    unet = UNet2DModel.from_pretrained(folder / "unet", low_cpu_mem_usage=False)
    first_stage = VQModel.from_pretrained(folder / "vqvae", low_cpu_mem_usage=False)
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    unet.eval().requires_grad_(False).to(device)
    first_stage.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def decode(latents: Tensor) -> Tensor:
        images = first_stage.decode(latents / first_stage.config.scaling_factor).sample
        return (images / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8).cpu()

    size = unet.config.sample_size
    return Model(unet, scheduler, (unet.config.in_channels, size, size), decode)


def save_tiny(folder: Path, seed: int) -> None:
    """Write a random LDM of a few thousand parameters: images 32x32, latents 3x8x8."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            layers_per_block=1,
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=16,
            norm_num_groups=8,
        )
        first_stage = VQModel(
            block_out_channels=(8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            latent_channels=3,
            num_vq_embeddings=16,
            norm_num_groups=4,
            scaling_factor=1.0,
        )
    scheduler = DDIMScheduler(
        beta_start=0.0015,
        beta_end=0.0195,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    LDMPipeline(first_stage, unet, scheduler).save_pretrained(folder)
    manifest.write(folder)


FAMILY = Family(load, save_tiny)
