"""The networks of an architecture, and the tensors that its original checkpoint has to have: no more, no fewer."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import diffusers
import torch
import transformers
from torch import nn
from transformers import CLIPTextConfig

from benchmarks.models.class_ldm import ClassEmbedding
from benchmarks.sources.archive import Mismatch
from benchmarks.sources.originals import keys
from benchmarks.sources.originals.architectures import ARCHITECTURES, Architecture, Settings, Size
from benchmarks.sources.originals.checkpoint_file import CheckpointFile
from benchmarks.sources.originals.keys import Source
from tfmq.network.attention_heads import set_attention_heads

# Tensors under these names are the networks'. Others are the training's: schedules, losses, counts of the average.
NETWORKS = ("model.", "first_stage_model.", "cond_stage_model.", "conditioner.")
IGNORED = re.compile(
    r"model_ema\.(decay|num_updates)|first_stage_model\.loss\..*"
    r"|(cond_stage_model|conditioner\.embedders\.0)\.transformer\.text_model\.embeddings\.position_ids"
    r"|conditioner\.embedders\.1\.model\.logit_scale"
)


@dataclass(frozen=True)
class Part:
    """A network without numbers (on torch's meta device), and where the file has them."""

    network: nn.Module
    sources: list[Source]

    @property
    def count(self) -> int:
        """How many numbers it has."""
        return sum(math.prod(source.shape) for source in self.sources)


@dataclass(frozen=True)
class Expected:
    """What a checkpoint of an architecture at one of its sizes holds.

    Attributes:
        parts: the networks, by the name of the folder that each is written to.
        others: tensors of the networks that have to be there too, and are not converted.
    """

    parts: dict[str, Part]
    others: list[Source]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor that has to be there."""
        read = [source for part in self.parts.values() for source in part.sources]
        return {source.key: source.shape for source in read + self.others}


def expected(architecture: Architecture, size: Size) -> Expected:
    """What a checkpoint of ``architecture`` at one of its sizes holds."""
    with torch.device("meta"):
        unet = _diffusers(size.unet)
        if size.heads is not None:
            set_attention_heads(unet, size.heads)
        sources = keys.pixel_unet(unet) if architecture.flat else keys.latent_unet(unet)
        averaged = [source.averaged() for source in sources]
        parts = {"unet": Part(unet, averaged if architecture.averaged else sources)}
        if size.first_stage is not None:
            network = _diffusers(size.first_stage)
            folder = "vae" if size.text_encoder is not None else "vqvae"
            parts[folder] = Part(network, keys.first_stage(network))
        if size.text_encoder is not None:
            network = _text_encoder(size.text_encoder)
            owner = "cond_stage_model" if size.second_text_encoder is None else "conditioner.embedders.0"
            parts["text_encoder"] = Part(network, keys.text_encoder(network, owner))
        if size.second_text_encoder is not None:
            network = _text_encoder(size.second_text_encoder)
            found = keys.open_clip_text_encoder(network, "conditioner.embedders.1.model")
            parts["text_encoder_2"] = Part(network, found)
        if size.classes:
            names = [str(index) for index in range(size.classes)]
            network = ClassEmbedding(names, size.unet["cross_attention_dim"])
            parts["class_embedding"] = Part(network, keys.class_embedding(network))
    return Expected(parts, sources if architecture.averaged else [])


def match(architecture: Architecture, file: CheckpointFile) -> Expected:
    """What a checkpoint of ``architecture`` holds, at the size of ``file``.

    Raises Mismatch if ``file`` does not hold just that, naming the first tensor that is missing, unexpected, of
    another shape or type; or the architecture that the file is of, if it is more like that one.
    """
    ours = max((expected(architecture, size) for size in _sizes(architecture)), key=lambda one: _likeness(one, file))
    faults = _faults(ours, architecture, file)
    if not faults:
        return ours
    likeness = _likeness(ours, file)
    if likeness < 0.9:
        for other in ARCHITECTURES.values():
            if any(_likeness(expected(other, size), file) > max(likeness, 0.5) for size in _sizes(other)):
                raise Mismatch(f"it is a checkpoint of {other.title}, not of {architecture.title}")
    more = f" (the first of {len(faults)} faults)" if len(faults) > 1 else ""
    raise Mismatch(f"it is not a checkpoint of {architecture.title}: {faults[0]}{more}")


def _sizes(architecture: Architecture) -> tuple[Size, Size]:
    return architecture.full, architecture.tiny


def _likeness(holds: Expected, file: CheckpointFile) -> float:
    """The share of the tensors that have to be there and are, in the right shape."""
    shapes = holds.shapes
    return sum(key in file.tensors and file.tensors[key].shape == shape for key, shape in shapes.items()) / len(shapes)


def _faults(holds: Expected, architecture: Architecture, file: CheckpointFile) -> list[str]:
    shapes, faults = holds.shapes, []
    strict = ("",) if architecture.flat else NETWORKS + ("model_ema.",) * architecture.averaged
    for key, shape in shapes.items():
        stored = file.tensors.get(key)
        if stored is None:
            faults.append(f"{key} is missing")
        elif stored.shape != shape:
            faults.append(f"{key} has shape {list(stored.shape)}, not {list(shape)}")
        elif stored.dtype != architecture.dtype:
            faults.append(f"{key} has numbers of type {stored.dtype}, not {architecture.dtype}")
    for key in file.tensors:
        if key.startswith(strict) and key not in shapes and not IGNORED.fullmatch(key):
            faults.append(f"{key} is unexpected")
    return faults


def _diffusers(settings: Settings) -> nn.Module:
    return getattr(diffusers, settings["_class_name"]).from_config(dict(settings))


def _text_encoder(settings: Settings) -> nn.Module:
    own = {name: value for name, value in settings.items() if name != "_class_name"}
    return getattr(transformers, settings["_class_name"])(CLIPTextConfig(**own))
