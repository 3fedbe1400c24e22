"""Class-conditional diffusion transformers: a VQ or KL first stage and a DiT, in the layout of diffusers' DiTPipeline.

The network embeds the class itself; one more class, the last, means none, for classifier-free guidance. The classes'
names are its prompts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel

from benchmarks.models import Family, Model
from benchmarks.models._latent import decoder, load_first_stage, tiny_scheduler, tiny_vq
from benchmarks.runtime import manifest
from benchmarks.suite import discover
from tfmq.network.sampling import Conditioning

INDEX = "model_index.json"


def load(folder: Path, device: torch.device) -> Model:
    """Load ``transformer/``, ``vae/`` and ``scheduler/`` as float32, after checking their hashes."""
    manifest.verify(folder)
    transformer = DiTTransformer2DModel.from_pretrained(folder / "transformer", low_cpu_mem_usage=False)
    first_stage = load_first_stage(folder / "vae")
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    for network in (transformer, first_stage):
        network.eval().requires_grad_(False).to(device)
    labels = json.loads((folder / INDEX).read_text(encoding="utf-8"))["id2label"]
    classes = {name: int(number) for number, name in labels.items()}
    no_class = transformer.config.num_embeds_ada_norm

    def conditioning(prompts: Sequence[str]) -> Conditioning:
        for prompt in prompts:
            if prompt not in classes:
                raise discover.unknown(f"class of {folder}", prompt, classes, "Prompts are names of classes.")
        numbers = torch.tensor([classes[prompt] for prompt in prompts], device=device)
        return Conditioning(numbers, torch.full_like(numbers, no_class))

    size = transformer.config.sample_size
    return Model(
        transformer, scheduler, (transformer.config.in_channels, size, size), decoder(first_stage), conditioning
    )


def save_tiny(folder: Path, seed: int) -> None:
    """Write a random model of a few thousand parameters: classes `circle` and `square`, images 32x32, latents 3x8x8."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {
            "transformer": DiTTransformer2DModel(
                num_attention_heads=2,
                attention_head_dim=8,
                in_channels=3,
                out_channels=3,
                num_layers=2,
                sample_size=8,
                patch_size=2,
                num_embeds_ada_norm=2,
            ),
            "vae": tiny_vq(),
            "scheduler": tiny_scheduler(),
        }
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    labels = {"id2label": {"0": "circle", "1": "square"}}
    (folder / INDEX).write_text(json.dumps(labels), encoding="utf-8")
    manifest.write(folder)


FAMILY = Family(load, save_tiny, network="transformer")
