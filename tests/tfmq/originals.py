"""The UNets of the seven original checkpoints, full-size (on the meta device) and tiny; see tests/data/unets."""

from __future__ import annotations

import json

import diffusers
import torch

from tests import vectors
from tfmq.network.attention_heads import set_attention_heads
from tfmq.network.unet import UNet

_FAMILIES = json.loads((vectors.folder("unets") / "unets.json").read_text(encoding="utf-8"))
FAMILIES = tuple(_FAMILIES)
# Without those whose tiny network another one has too.
DISTINCT = tuple({json.dumps(_FAMILIES[family]["tiny"]): family for family in reversed(FAMILIES)}.values())


def described(family: str) -> dict:
    """What the file says of a family."""
    return _FAMILIES[family]


def full_size(family: str) -> UNet:
    """The real architecture, without memory for its weights."""
    with torch.device("meta"):
        return build(described(family)["full"], described(family)["heads"])


def tiny(family: str, seed: int = 0) -> UNet:
    """A small network of the same structure with random weights, biases and norms too."""
    torch.manual_seed(seed)
    unet = build(described(family)["tiny"], described(family)["tiny_heads"])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return unet


def arguments(unet: UNet, images: int = 2) -> tuple[torch.Tensor, ...]:
    """Latents of 16x16, time steps that differ, and a context of 5 tokens where the network takes one."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(images, unet.config.in_channels, 16, 16, generator=generator)
    timesteps = torch.tensor([501, 1, 951, 301])[:images]
    if not isinstance(unet, diffusers.UNet2DConditionModel):
        return latents, timesteps
    return latents, timesteps, torch.randn(images, 5, unet.config.cross_attention_dim, generator=generator)


def build(config: dict, heads: int | None) -> UNet:
    """A network of diffusers' settings, with the attention heads that these cannot say."""
    options = {name: value for name, value in config.items() if name != "_class_name"}
    unet = getattr(diffusers, config["_class_name"])(**options).eval().requires_grad_(False)
    if heads is not None:
        set_attention_heads(unet, heads)
    return unet
