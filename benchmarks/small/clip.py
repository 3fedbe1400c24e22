"""Small CLIPs on emoji and their names: one tells the text-to-image model its prompt, another one scores its images.

Two towers trained to tell which name of a batch belongs to which image (Radford et al., 2021, arXiv:2103.00020).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig

from benchmarks.features._clip import embed_images, embed_prompts, pixels, tokenize
from benchmarks.small import training
from benchmarks.small.training import TrainingConfig, batch_indices, generator

SIZE = 64


@dataclass(frozen=True)
class ContrastiveConfig(TrainingConfig):
    """Both towers have the same width and depth; `vocabulary` and `length` count tokens, `shift` and `patch` pixels."""

    vocabulary: int
    length: int
    width: int
    layers: int
    heads: int
    patch: int
    shift: int


def build_tokenizer(names: Sequence[str], config: ContrastiveConfig) -> CLIPTokenizer:
    """CLIP's tokenizer with byte pairs learned from some names."""
    empty = CLIPTokenizer(model_max_length=config.length)
    return empty.train_new_from_iterator(sorted(set(names)), config.vocabulary, show_progress=False)


def build(config: ContrastiveConfig, tokenizer: CLIPTokenizer) -> CLIPModel:
    """The untrained towers, for images of 64x64 pixels."""
    tower = {
        "hidden_size": config.width,
        "intermediate_size": 4 * config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "projection_dim": config.width,
    }
    text = CLIPTextConfig(
        **tower,
        vocab_size=len(tokenizer),
        max_position_embeddings=config.length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(**tower, image_size=SIZE, patch_size=config.patch)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=config.width))


def train(
    config: ContrastiveConfig,
    tokenizer: CLIPTokenizer,
    images: Tensor,
    names: Sequence[str],
    held_out: tuple[Tensor, Sequence[str]],
    folder: Path,
    log_path: Path,
) -> CLIPModel:
    """Train on uint8 images [N, 3, 64, 64] and their names, as `training.train` does; return the averaged weights.

    An epoch sees each name once, with one of its images, moved by up to `shift` pixels. So no batch holds two images
    that the same name belongs to. The log has the `scores` of held-out images and names.
    """
    distinct = sorted(set(names))
    tokens = tokenize(tokenizer, distinct)
    of_name: dict[str, list[int]] = {name: [] for name in distinct}
    for index, name in enumerate(names):
        of_name[name].append(index)
    torch.manual_seed(config.seed)
    model = build(config, tokenizer)

    def losses(iteration: int) -> dict[str, Tensor]:
        chosen = batch_indices(iteration, config.batch, len(distinct), config.seed)
        source = generator(config.seed, iteration)
        lots = torch.rand(len(chosen), generator=source).tolist()
        candidates = [of_name[distinct[index]] for index in chosen.tolist()]
        picked = [indices[int(lot * len(indices))] for indices, lot in zip(candidates, lots, strict=True)]
        offsets = torch.randint(2 * config.shift + 1, (len(chosen), 2), generator=source)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(tokens[chosen], move(pixels(images[picked], SIZE), offsets, config.shift))
        logits = output.logits_per_text.float()
        targets = torch.arange(len(chosen))
        return {"loss": (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2}

    def measure(average: CLIPModel) -> dict[str, float]:
        return scores(average, tokenizer, *held_out)

    return training.train(config, model, losses, folder, log_path, measure)


def move(images: Tensor, offsets: Tensor, shift: int) -> Tensor:
    """Images [B, C, H, W] with a white border of `shift` pixels, cut to their size at offsets [B, 2] (row, column)."""
    height, width = images.shape[2:]
    padded = F.pad(images, (shift,) * 4, value=1.0)
    cuts = [
        image[:, top : top + height, left : left + width]
        for image, (top, left) in zip(padded, offsets.tolist(), strict=True)
    ]
    return torch.stack(cuts)


@torch.no_grad()
def scores(model: CLIPModel, tokenizer: CLIPTokenizer, images: Tensor, names: Sequence[str]) -> dict[str, float]:
    """Cosine x 100 of uint8 images [N, 3, 64, 64] with their own names and, on average, with all other distinct names.

    `retrieved` is the share of the images whose own name is the nearest of all distinct ones.
    """
    distinct = sorted(set(names))
    own = torch.tensor([distinct.index(name) for name in names])
    cosines = 100 * embed_images(model, images) @ embed_prompts(model, tokenizer, distinct).T
    matching = cosines.gather(1, own[:, None]).squeeze(1)
    others = (cosines.sum(dim=1) - matching) / (len(distinct) - 1)
    return {
        "matching": matching.mean().item(),
        "others": others.mean().item(),
        "retrieved": (cosines.argmax(dim=1) == own).float().mean().item(),
    }


@torch.no_grad()
def contexts(encoder: CLIPTextModel, tokenizer: CLIPTokenizer, names: Sequence[str]) -> Tensor:
    """What cross-attention sees of names, as in Stable Diffusion: the last hidden states [N, length, width]."""
    return torch.cat([encoder(part).last_hidden_state for part in tokenize(tokenizer, names).split(256)])
