"""What families of latent diffusion share: first stages, decoding, and the schedule of their tiny checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, VQModel
from torch import Tensor

from benchmarks.models import rounded
from benchmarks.suite import discover

FIRST_STAGES = {"VQModel": VQModel, "AutoencoderKL": AutoencoderKL}
TINY_UNET = {"sample_size": 8, "layers_per_block": 1, "block_out_channels": (16, 32), "norm_num_groups": 8}
TINY_FIRST_STAGE = {
    "block_out_channels": (8, 8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "norm_num_groups": 4,
}


def load_first_stage(folder: Path) -> VQModel | AutoencoderKL:
    """The first stage in ``folder``, as float32. Raises ValueError unless its kind is one of FIRST_STAGES."""
    name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["_class_name"]
    if name not in FIRST_STAGES:
        raise discover.unknown(f"first stage in {folder}", name, FIRST_STAGES, "Take a checkpoint with one of them.")
    return FIRST_STAGES[name].from_pretrained(folder, low_cpu_mem_usage=False)


def decoder(first_stage: VQModel | AutoencoderKL) -> Callable[[Tensor], Tensor]:
    """Maps latents (B, C, H, W) to images uint8 (B, 3, height, width)."""

    @torch.no_grad()
    def decode(latents: Tensor) -> Tensor:
        return rounded(first_stage.decode(latents / first_stage.config.scaling_factor).sample)

    return decode


def tiny_vq() -> VQModel:
    """A random VQ first stage: latents of 3 channels at a quarter of the images' side."""
    return VQModel(**TINY_FIRST_STAGE, latent_channels=3, num_vq_embeddings=16, scaling_factor=1.0)


def tiny_scheduler() -> DDIMScheduler:
    """The schedule of latent diffusion."""
    return DDIMScheduler(
        beta_start=0.0015,
        beta_end=0.0195,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
