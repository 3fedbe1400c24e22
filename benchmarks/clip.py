"""The CLIP that scores images against their prompts, and how images and prompts enter it, in training as in scoring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import manifest
from benchmarks.features import resize

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import CLIPModel, CLIPTokenizer

BATCH = 64


@dataclass(frozen=True)
class ClipScorer:
    """A CLIP with its tokenizer. Scores of different ``identity`` are not comparable."""

    identity: str
    model: CLIPModel
    tokenizer: CLIPTokenizer

    def cosines(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosine [N] between each of the uint8 images [N, 3, H, W] and its own prompt; float32 on the CPU.

        Raises ValueError unless every image has a prompt.
        """
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images are scored against {len(prompts)} prompts: give one to each")
        distinct = sorted(set(prompts))
        texts = embed_prompts(self.model, self.tokenizer, distinct)
        own = torch.tensor([distinct.index(prompt) for prompt in prompts])
        return (embed_images(self.model, images) * texts[own]).sum(dim=1)


def load_clip(folder: Path, device: torch.device) -> ClipScorer:
    """The CLIP in ``folder`` (``model/``, ``tokenizer/`` and a manifest), in float32.

    Its identity is the folder's name and the SHA-256 of the weights, as in ``emoji-clip 57934424``. Raises ValueError
    naming the file that is missing or damaged.
    """
    from transformers import CLIPModel, CLIPTokenizer

    manifest.verify(folder)
    digest = manifest.sha256(folder / "model" / "model.safetensors")
    model = CLIPModel.from_pretrained(folder / "model", dtype=torch.float32, local_files_only=True)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    return ClipScorer(f"{folder.name} {digest[:8]}", model.eval().requires_grad_(False).to(device), tokenizer)


def pixels(images: Tensor, size: int) -> Tensor:
    """What the image tower sees of uint8 images [N, 3, H, W]: resized to ``size``, from -1 to 1."""
    return resize(images, size) / 127.5 - 1


def tokenize(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Tensor:
    """Token indices [N, length], padded as Stable Diffusion pads prompts."""
    return tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt").input_ids


@torch.no_grad()
def embed_images(model: CLIPModel, images: Tensor) -> Tensor:
    """Unit vectors [N, D] of uint8 images [N, 3, H, W], on the CPU."""
    size = model.config.vision_config.image_size
    parts = [
        model.get_image_features(pixels(part, size).to(model.device)).pooler_output for part in images.split(BATCH)
    ]
    return functional.normalize(torch.cat(parts), dim=1).cpu()


@torch.no_grad()
def embed_prompts(model: CLIPModel, tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Tensor:
    """Unit vectors [N, D] of prompts, on the CPU."""
    parts = [model.get_text_features(part.to(model.device)) for part in tokenize(tokenizer, prompts).split(BATCH)]
    return functional.normalize(torch.cat([part.pooler_output for part in parts]), dim=1).cpu()
