"""The CLIPs that score images against their prompts, and how images and prompts enter them."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional

from benchmarks.features import resize
from benchmarks.runtime import manifest

if TYPE_CHECKING:  # importing transformers takes seconds
    import PIL.Image
    from open_clip import CLIP
    from transformers import CLIPModel, CLIPTokenizer

BATCH = 64
OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


class Scorer(Protocol):
    """A CLIP with its tokenizer. Scores of different ``identity`` are not comparable."""

    identity: str

    def embed_images(self, images: Tensor) -> Tensor:
        """Unit vectors [N, D] of uint8 images [N, 3, H, W], on the CPU."""

    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors [N, D] of prompts, on the CPU."""


def prompt_vectors(scorer: Scorer, prompts: Sequence[str]) -> Tensor:
    """Unit vectors [N, D] of prompts, where each different one is embedded once."""
    distinct = sorted(set(prompts))
    row = {prompt: index for index, prompt in enumerate(distinct)}
    return scorer.embed_prompts(distinct)[[row[prompt] for prompt in prompts]]


def cosines(scorer: Scorer, vectors: Tensor, images: Tensor) -> Tensor:
    """Cosine [N] between each of the uint8 images [N, 3, H, W] and its own prompt's vector [N, D]; float32 on the CPU.

    Raises ValueError unless every image has a prompt.
    """
    if len(images) != len(vectors):
        raise ValueError(f"{len(images)} images are scored against {len(vectors)} prompts: give one to each")
    return (scorer.embed_images(images) * vectors).sum(dim=1)


def load_clip(folder: Path, device: torch.device) -> Scorer:
    """The CLIP in ``folder``, in float32: of transformers (``model/``, ``tokenizer/``) or of open_clip.

    A folder of open_clip holds ``open_clip_config.json`` and one file of weights. Raises ValueError naming the file
    that is missing or damaged.
    """
    if (folder / OPEN_CLIP_CONFIG).is_file():
        return _load_open_clip(folder, device)
    return _load_transformers(folder, device)


@dataclass(frozen=True)
class ClipScorer:
    """A CLIP of transformers."""

    identity: str
    model: CLIPModel
    tokenizer: CLIPTokenizer

    def embed_images(self, images: Tensor) -> Tensor:
        return embed_images(self.model, images)

    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        return embed_prompts(self.model, self.tokenizer, prompts)


def _load_transformers(folder: Path, device: torch.device) -> ClipScorer:
    # The identity is the folder's name and the SHA-256 of the weights, as in `emoji-clip 57934424`.
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


@dataclass(frozen=True)
class OpenClipScorer:
    """A CLIP of open_clip, with its own preprocessing of single Pillow images and its own tokenizer."""

    identity: str
    model: CLIP
    preprocess: Callable[[PIL.Image.Image], Tensor]
    tokenizer: Callable[[list[str]], Tensor]
    device: torch.device

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        from PIL import Image

        parts = []
        for part in images.split(BATCH):
            seen = [self.preprocess(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in part]
            parts.append(self.model.encode_image(torch.stack(seen).to(self.device), normalize=True).cpu())
        return torch.cat(parts)

    @torch.no_grad()
    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        parts = self.tokenizer(list(prompts)).split(BATCH)
        return torch.cat([self.model.encode_text(part.to(self.device), normalize=True).cpu() for part in parts])


def _load_open_clip(folder: Path, device: torch.device) -> OpenClipScorer:
    # The identity is open_clip's name of the architecture, the folder's name and the SHA-256 of the weights, as in
    # `ViT-B-32 openai 57934424`.
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict

    weights = [path for path in sorted(folder.iterdir()) if path.suffix in OPEN_CLIP_WEIGHTS]
    if len(weights) != 1:
        found = ", ".join(path.name for path in weights) or "none"
        raise ValueError(f"{folder} must hold one file of weights ({', '.join(OPEN_CLIP_WEIGHTS)}); found {found}")
    if (folder / manifest.NAME).exists():
        manifest.verify(folder)
    try:
        config = json.loads((folder / OPEN_CLIP_CONFIG).read_text(encoding="utf-8"))
        architecture = config["model_cfg"]
        model = open_clip.CLIP(**architecture)
        open_clip.load_checkpoint(model, str(weights[0]), weights_only=True)
    except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError, pickle.UnpicklingError, EOFError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{folder} holds no CLIP that open_clip can load: fetch it again ({reason})") from error
    seen = merge_preprocess_dict(asdict(PreprocessCfg()), config.get("preprocess_cfg", {}))
    preprocess = image_transform_v2(PreprocessCfg(**seen | {"size": model.visual.image_size}), is_train=False)
    names = (name for name in open_clip.list_models() if open_clip.get_model_config(name) == architecture)
    backbone = next(names, "open_clip").removesuffix("-quickgelu")
    identity = f"{backbone} {folder.name} {manifest.sha256(weights[0])[:8]}"
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    return OpenClipScorer(identity, model.eval().requires_grad_(False).to(device), preprocess, tokenizer, device)
