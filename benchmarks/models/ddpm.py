"""Unconditional diffusion of pixels (DDPM, DDIM): a UNet2DModel and no first stage, in the layout of DDIMPipeline.

The form of DDIM's CIFAR-10 model (Song et al., 2021, arXiv:2010.02502).
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

from benchmarks.models import Family, Model, rounded
from benchmarks.runtime import manifest


def load(folder: Path, device: torch.device) -> Model:
    """Load ``unet/`` and ``scheduler/`` of ``folder`` as float32, after checking the files' hashes."""
    manifest.verify(folder)
    unet = UNet2DModel.from_pretrained(folder / "unet", low_cpu_mem_usage=False)
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    unet.eval().requires_grad_(False).to(device)
    size = unet.config.sample_size
    return Model(unet, scheduler, (unet.config.in_channels, size, size), rounded)


def save_tiny(folder: Path, seed: int) -> None:
    """Write a random model of a few thousand parameters: images 8x8."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            layers_per_block=1,
            block_out_channels=(16, 32),
            norm_num_groups=8,
            norm_eps=1e-6,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=None,
            downsample_padding=0,
            flip_sin_to_cos=False,
            freq_shift=1,
        )
    DDIMPipeline(unet, DDIMScheduler(clip_sample=False)).save_pretrained(folder)
    manifest.write(folder)


FAMILY = Family(load, save_tiny)
