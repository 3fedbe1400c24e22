"""Class-conditional latent diffusion: a VQ or KL first stage, and a UNet that sees a class by cross-attention.

The form of LDM's ImageNet model (Rombach et al., 2022, arXiv:2112.10752): each class is one learned token, and one more
means no class, for classifier-free guidance. The classes' names are its prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import ConfigMixin, DDIMScheduler, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from benchmarks.models import Family, Model
from benchmarks.models._latent import TINY_UNET, decoder, load_first_stage, tiny_scheduler, tiny_vq
from benchmarks.runtime import manifest
from benchmarks.suite import discover
from tfmq.network.sampling import Conditioning


class ClassEmbedding(ModelMixin, ConfigMixin):
    """What cross-attention sees of a class: one learned token for each of `classes`, then one that means none."""

    @register_to_config
    def __init__(self, classes: list[str], channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(len(classes) + 1, channels))

    def forward(self, indices: Tensor) -> Tensor:
        """The context [B, 1, channels] of class indices [B]."""
        return self.weight[indices][:, None]


def load(folder: Path, device: torch.device) -> Model:
    """Load ``unet/``, ``vqvae/``, ``class_embedding/`` and ``scheduler/`` as float32, after checking their hashes."""
    manifest.verify(folder)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", low_cpu_mem_usage=False)
    first_stage = load_first_stage(folder / "vqvae")
    embedding = ClassEmbedding.from_pretrained(folder / "class_embedding", low_cpu_mem_usage=False)
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    for network in (unet, first_stage, embedding):
        network.eval().requires_grad_(False).to(device)
    classes = list(embedding.config.classes)

    def conditioning(prompts: Sequence[str]) -> Conditioning:
        for prompt in prompts:
            if prompt not in classes:
                raise discover.unknown(f"class of {folder}", prompt, classes, "Prompts are names of classes.")
        indices = torch.tensor([classes.index(prompt) for prompt in prompts], device=device)
        return Conditioning(embedding(indices), embedding(torch.full_like(indices, len(classes))))

    size = unet.config.sample_size
    return Model(unet, scheduler, (unet.config.in_channels, size, size), decoder(first_stage), conditioning)


def save_tiny(folder: Path, seed: int) -> None:
    """Write a random model of a few thousand parameters: classes `circle` and `square`, images 32x32, latents 3x8x8."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {
            "unet": UNet2DConditionModel(
                **TINY_UNET,
                in_channels=3,
                out_channels=3,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                cross_attention_dim=8,
                attention_head_dim=2,
            ),
            "vqvae": tiny_vq(),
            "class_embedding": ClassEmbedding(["circle", "square"], 8),
            "scheduler": tiny_scheduler(),
        }
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    manifest.write(folder)


FAMILY = Family(load, save_tiny)
