"""Which tensors an original checkpoint has, and what becomes of each.

The rules go from the names of a diffusers network to those of the original, so that all names and shapes of a file are
known before it is read. Original names come in two forms. CompVis' latent diffusion has its UNet from OpenAI's guided
diffusion, which numbers its blocks through; its first stages, and the DDIM model for CIFAR-10, are named by resolution.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, ModelMixin, VQModel
from torch import Tensor, nn

from tfmq.network.unet import UNet

NUMBERED = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
    "group_norm": "norm",
    "to_q": "qkv",
    "to_k": "qkv",
    "to_v": "qkv",
    "to_out.0": "proj_out",
}
BY_RESOLUTION = {
    "time_embedding.linear_1": "temb.dense.0",
    "time_embedding.linear_2": "temb.dense.1",
    "conv_norm_out": "norm_out",
    "time_emb_proj": "temb_proj",
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
# OpenCLIP's text tower, which names its blocks as OpenAI's code does.
OPEN_CLIP = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}
OPEN_CLIP_LAYER = re.compile(r"text_model\.encoder\.layers\.(?P<index>\d+)\.(?P<part>.+)\.(?P<kind>weight|bias)")
OPEN_CLIP_PARTS = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
# Linear layers here, convolutions over one pixel there. A joint one is split by the heads of the module it belongs to.
PROJECTION = re.compile(r"(?P<attention>.*\.attentions\.\d+)\.(to_[qkv]|to_out\.0)\.(?P<kind>weight|bias)")


@dataclass(frozen=True)
class Source:
    """A tensor of an original checkpoint.

    Attributes:
        key, shape: there.
        to: names and shapes in the diffusers network: one, or those of query, key and value.
        heads: that query, key and value are split by, since a head's three follow one another.
        transposed: it is a matrix that vectors are multiplied with from the left.
    """

    key: str
    shape: tuple[int, ...]
    to: dict[str, tuple[int, ...]]
    heads: int = 1
    transposed: bool = False

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """What the original tensor becomes, by name; no two share memory."""
        tensor = tensor.T if self.transposed else tensor
        parts = (tensor,) if len(self.to) == 1 else tensor.unflatten(0, (self.heads, len(self.to), -1)).unbind(1)
        return {
            name: part.reshape(shape).clone(memory_format=torch.contiguous_format)
            for (name, shape), part in zip(self.to.items(), parts, strict=True)
        }

    def averaged(self) -> Source:
        """The same tensor averaged over training (EMA), which has a name without dots."""
        return dataclasses.replace(self, key="model_ema." + self.key.removeprefix("model.").replace(".", ""))


def latent_unet(unet: UNet) -> list[Source]:
    """Sources of a latent diffusion UNet."""
    layers = unet.config.layers_per_block
    attended = {name.split(".")[1] for name, _ in unet.named_modules() if re.match(r"up_blocks\.\d+\.attentions", name)}
    return _sources(unet, lambda path: "model.diffusion_model." + _numbered(path, layers, attended), 1)


def first_stage(network: VQModel | AutoencoderKL) -> list[Source]:
    """Sources of a first stage."""
    levels = len(network.config.block_out_channels)
    return _sources(network, lambda path: "first_stage_model." + _by_resolution(path, levels), 2)


def pixel_unet(unet: UNet) -> list[Source]:
    """Sources of the DDIM UNet for CIFAR-10."""
    levels = len(unet.config.block_out_channels)
    return _sources(unet, lambda path: _by_resolution(path, levels), 2)


def class_embedding(network: ModelMixin) -> list[Source]:
    """The source of the tokens of all classes."""
    return _sources(network, lambda path: "cond_stage_model.embedding", 0)


def text_encoder(network: nn.Module, owner: str) -> list[Source]:
    """Sources of CLIP's text tower, a part of the original's ``owner``.

    transformers before 5.6 has a prefix in its names, as the original has.
    """
    return _sources(network, lambda path: f"{owner}.transformer.text_model." + path.removeprefix("text_model."), 0)


def open_clip_text_encoder(network: nn.Module, owner: str) -> list[Source]:
    """Sources of a text tower with its projection that OpenCLIP has trained: query, key and value are one tensor."""
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    sources = []
    for name, shape in shapes.items():
        layer = OPEN_CLIP_LAYER.fullmatch(name)
        if layer is None:
            transposed = name == "text_projection.weight"
            there = shape[::-1] if transposed else shape
            sources.append(Source(f"{owner}.{OPEN_CLIP[name]}", there, {name: shape}, transposed=transposed))
            continue
        path, kind = f"{owner}.transformer.resblocks.{layer['index']}", layer["kind"]
        if not layer["part"].startswith("self_attn.") or layer["part"] == "self_attn.out_proj":
            key = f"{path}.{OPEN_CLIP_PARTS[layer['part']]}.{kind}"
            sources.append(Source(key, shape, {name: shape}))
        elif layer["part"] == "self_attn.q_proj":
            names = [name.replace("q_proj", f"{each}_proj") for each in "qkv"]
            joint = (3 * shape[0], *shape[1:])
            sources.append(Source(f"{path}.attn.in_proj_{kind}", joint, {each: shapes[each] for each in names}))
    return sources


def _sources(network: nn.Module, original: Callable[[str], str], axes: int) -> list[Source]:
    """A source for each tensor of ``network``, or for three; the originals of projections have ``axes`` axes more."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, tensor in network.state_dict().items():
        path, _, kind = name.rpartition(".")
        found.setdefault(f"{original(path)}.{kind}", {})[name] = tuple(tensor.shape)
    sources = []
    for key, to in found.items():
        name, (first, *rest) = next(iter(to.items()))
        projection, heads = PROJECTION.fullmatch(name), 1
        if projection and projection["kind"] == "weight":
            rest += [1] * axes
        if len(to) > 1:
            heads = network.get_submodule(projection["attention"]).heads
        sources.append(Source(key, (len(to) * first, *rest), to, heads))
    return sources


def _numbered(path: str, layers: int, attended: set[str]) -> str:
    """The original path of a UNet's module; ``attended`` are the stages of the way up that have attention.

    A stage of the way down has ``layers`` numbered parts and a downsampler, one of the way up a part more; there, the
    upsampler belongs to the last part, after its residual block and its attention.
    """
    match path.split("."):
        case ["conv_in"]:
            return "input_blocks.0.0"
        case ["conv_norm_out"]:
            return "out.0"
        case ["conv_out"]:
            return "out.2"
        case ["time_embedding", linear]:
            return {"linear_1": "time_embed.0", "linear_2": "time_embed.2"}[linear]
        case ["add_embedding", linear]:
            return {"linear_1": "label_emb.0.0", "linear_2": "label_emb.0.2"}[linear]
        case ["mid_block", part, index, *inner]:
            return f"middle_block.{1 if part == 'attentions' else 2 * int(index)}.{_inner(inner, NUMBERED)}"
        case ["down_blocks", stage, "downsamplers", _, *inner]:
            number = 1 + int(stage) * (layers + 1) + layers
            return f"input_blocks.{number}.0.{'op' if inner == ['conv'] else _inner(inner, NUMBERED)}"
        case ["down_blocks", stage, part, index, *inner]:
            number = 1 + int(stage) * (layers + 1) + int(index)
            return f"input_blocks.{number}.{int(part == 'attentions')}.{_inner(inner, NUMBERED)}"
        case ["up_blocks", stage, "upsamplers", _, *inner]:
            number = int(stage) * (layers + 1) + layers
            return f"output_blocks.{number}.{1 + (stage in attended)}.{_inner(inner, NUMBERED)}"
        case ["up_blocks", stage, part, index, *inner]:
            number = int(stage) * (layers + 1) + int(index)
            return f"output_blocks.{number}.{int(part == 'attentions')}.{_inner(inner, NUMBERED)}"
    raise ValueError(f"{path} is not part of a UNet of latent diffusion")


def _by_resolution(path: str, levels: int) -> str:
    """The original path of a module of a first stage, or of the DDIM UNet; ``up.0`` is the highest resolution."""
    match path.split("."):
        case ["encoder" | "decoder" as half, *rest]:
            return f"{half}.{_by_resolution('.'.join(rest), levels)}"
        case ["mid_block", "attentions", _, *inner]:
            return f"mid.attn_1.{_inner(inner, BY_RESOLUTION)}"
        case ["mid_block", "resnets", index, *inner]:
            return f"mid.block_{int(index) + 1}.{_inner(inner, BY_RESOLUTION)}"
        case ["down_blocks" | "up_blocks" as way, level, part, index, *inner]:
            stage = f"down.{level}" if way == "down_blocks" else f"up.{levels - 1 - int(level)}"
            name = {
                "resnets": f"block.{index}",
                "attentions": f"attn.{index}",
                "downsamplers": "downsample",
                "upsamplers": "upsample",
            }
            return f"{stage}.{name[part]}.{_inner(inner, BY_RESOLUTION)}"
    return _inner([path], BY_RESOLUTION)


def _inner(path: list[str], names: dict[str, str]) -> str:
    joined = ".".join(path)
    return names.get(joined, joined)
