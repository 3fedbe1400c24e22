"""diffusers' UNets, block by block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from tfmq.network.backbone import Backbone, Block

UNet: TypeAlias = UNet2DModel | UNet2DConditionModel


class NoTimeEmbedding(nn.Module):
    """Takes the place of the time-embedding network where nothing needs its output: lets the encoding pass."""

    def forward(self, encoding: Tensor, condition: Tensor | None = None) -> Tensor:
        return encoding


@dataclass(frozen=True)
class UNetBackbone(Backbone):
    """The backbone of a UNet2DModel, or of a UNet2DConditionModel, whose latents go with a context (B, tokens, D).

    The temporal information block is the time-embedding network, and the linear layer in each residual block that
    projects its output. Downsampling convolutions are those of their own: a residual block that downsamples (LDM-8
    churches) averages pixels, without weights, and its convolutions are those of any residual block.
    """

    @classmethod
    def of(cls, unet: UNet) -> UNetBackbone:
        """See `Backbone`."""
        time_act = getattr(unet, "time_embed_act", None)
        if unet.config.center_input_sample or time_act is not None or unet.config.time_embedding_type != "positional":
            raise ValueError("only UNets with a positional time embedding and an uncentred input are supported")
        blocks, splits = [], {}
        stack = [unet.conv_in.out_channels]
        blocks.append(Block("conv_in", push=True))
        for i, down in enumerate(unet.down_blocks):
            for j, (resnet, attention) in enumerate(_pairs(down.resnets, getattr(down, "attentions", None))):
                blocks.append(Block(f"down_blocks.{i}.resnets.{j}", push=attention is None))
                if attention is not None:
                    blocks.append(Block(f"down_blocks.{i}.attentions.{j}", push=True))
                stack.append(resnet.out_channels)
            for j, _ in enumerate(down.downsamplers or ()):
                blocks.append(Block(f"down_blocks.{i}.downsamplers.{j}", push=True))
                stack.append(stack[-1])
        channels = stack[-1]
        if unet.mid_block is not None:
            blocks.append(Block("mid_block.resnets.0"))
            for j, attention in enumerate(unet.mid_block.attentions):
                if attention is not None:
                    blocks.append(Block(f"mid_block.attentions.{j}"))
                blocks.append(Block(f"mid_block.resnets.{j + 1}"))
        for i, up in enumerate(unet.up_blocks):
            for j, (resnet, attention) in enumerate(_pairs(up.resnets, getattr(up, "attentions", None))):
                path = f"up_blocks.{i}.resnets.{j}"
                blocks.append(Block(path, pop=True))
                if resnet.conv_shortcut is not None:
                    splits[f"{path}.conv_shortcut"] = (channels, stack[-1])
                stack.pop()
                if attention is not None:
                    blocks.append(Block(f"up_blocks.{i}.attentions.{j}"))
                channels = resnet.out_channels
            for j, _ in enumerate(up.upsamplers or ()):
                blocks.append(Block(f"up_blocks.{i}.upsamplers.{j}"))
        blocks.append(Block("conv_out"))
        known = tuple(f"{path}." for path in (*(block.path for block in blocks), "time_embedding", "conv_norm_out"))
        for name, _ in unet.named_parameters():
            if not name.startswith(known):
                raise ValueError(f"the UNet has {name}, which is no part of the blocks and the time embedding")
        modules = dict(unet.named_modules())
        layers = [path for path, module in modules.items() if isinstance(module, nn.Conv2d | nn.Linear)]
        attentions = tuple(path for path, module in modules.items() if isinstance(module, Attention))
        inside = tuple(f"{path}." for path in attentions)
        time_embedding = ("time_embedding.linear_1", "time_embedding.linear_2")
        time_projections = tuple(
            f"{block.path}.time_emb_proj"
            for block in blocks
            if isinstance(modules[block.path], ResnetBlock2D) and modules[block.path].time_emb_proj is not None
        )
        return cls(
            blocks=tuple(blocks),
            time_embedding=time_embedding,
            time_projections=time_projections,
            attentions=attentions,
            roles={
                "boundary": ("conv_in", "conv_out"),
                "first_time_layer": time_embedding[:1],
                "second_time_layer": time_embedding[1:],
                "first_block_convolution": ("down_blocks.0.resnets.0.conv1",),
                "time_embedding": time_embedding,
                "time_projections": time_projections,
                "shortcuts": tuple(path for path in layers if path.endswith(".conv_shortcut")),
                "downsampling": tuple(
                    path
                    for path in layers
                    if ".downsamplers." in path and isinstance(modules[path.rpartition(".")[0]], Downsample2D)
                ),
                "attention_layers": tuple(path for path in layers if path.startswith(inside)),
                "attention_products": attentions,
            },
            shortcut_splits=splits,
            condition="context" if isinstance(unet, UNet2DConditionModel) else "none",
        )

    @staticmethod
    def evaluate(network: UNet, latents: Tensor, timesteps: Tensor, context: Tensor | None) -> Tensor:
        """See `Backbone`."""
        return network(latents, timesteps, *(() if context is None else (context,))).sample

    def random_condition(
        self,
        network: UNet,
        rows: int,
        tokens: int,
        device: torch.device,
        generator: torch.Generator | None = None,
    ) -> Tensor | None:
        """See `Backbone`."""
        if self.condition == "none":
            return None
        return torch.randn(rows, tokens, network.config.cross_attention_dim, device=device, generator=generator)

    def encoding(self, network: UNet, timesteps: Tensor) -> Tensor:
        """See `Backbone`."""
        return network.time_proj(timesteps)

    def time_input(self, network: UNet, timesteps: Tensor) -> Tensor:
        """See `Backbone`: the sinusoidal encoding through the time-embedding network."""
        return network.time_embedding(self.encoding(network, timesteps).to(network.dtype))

    def temporal_features(self, network: UNet, timesteps: Tensor) -> list[Tensor]:
        """See `Backbone`."""
        embedding = self.time_input(network, timesteps)
        features = []
        for path in self.time_projections:
            resnet = network.get_submodule(path.rpartition(".")[0])
            activated = embedding if resnet.skip_time_act else resnet.nonlinearity(embedding)
            features.append(resnet.time_emb_proj(activated))
        return features

    def run_block(
        self,
        network: UNet,
        block: Block,
        hidden: Tensor,
        time: Tensor,
        context: Tensor | None,
        size: torch.Size | None = None,
    ) -> Tensor:
        """See `Backbone`."""
        module = network.get_submodule(block.path)
        if isinstance(module, Upsample2D) and size is not None and (size[0], size[1]) != _doubled(hidden):
            return module(hidden, size)
        if isinstance(module, ResnetBlock2D):
            return module(hidden, time)
        if isinstance(module, Transformer2DModel):
            return module(hidden, encoder_hidden_states=context, return_dict=False)[0]
        if block.path == "conv_out":
            if network.conv_norm_out is not None:
                hidden = network.conv_act(network.conv_norm_out(hidden))
            return module(hidden)
        return module(hidden)

    @staticmethod
    def check_size(network: UNet, height: int, width: int) -> None:
        """See `Backbone`. A UNet2DConditionModel fits what it upsamples to any size, where that is interpolation."""
        steps = [up.upsamplers[0] for up in network.up_blocks if getattr(up, "upsamplers", None)]
        interpolated = all(isinstance(step, Upsample2D) and not step.use_conv_transpose for step in steps)
        if isinstance(network, UNet2DConditionModel) and interpolated:
            return
        multiple = 2 ** len(steps)
        if height % multiple or width % multiple:
            raise ValueError(
                f"latents of {height}x{width}: a {type(network).__name__} that halves them {len(steps)} times takes "
                f"multiples of {multiple}"
            )

    def drop_time_embedding(self, network: UNet) -> None:
        """See `Backbone`."""
        network.time_embedding = NoTimeEmbedding()

    def silu_inputs(self, network: UNet) -> set[str]:
        """See `Backbone`."""
        paths = set()
        for block in self.blocks:
            module = network.get_submodule(block.path)
            if isinstance(module, ResnetBlock2D) and isinstance(module.nonlinearity, nn.SiLU):
                paths |= {f"{block.path}.conv1", f"{block.path}.conv2"}
                if module.time_emb_proj is not None and not module.skip_time_act:
                    paths.add(f"{block.path}.time_emb_proj")
        if isinstance(network.time_embedding.act, nn.SiLU):
            paths.add("time_embedding.linear_2")
        if network.conv_norm_out is not None and isinstance(network.conv_act, nn.SiLU):
            paths.add("conv_out")
        return paths


def set_attention_heads(unet: UNet2DModel, heads: int) -> None:
    """Set the number of heads of every attention of ``unet``, in place, and record it in its config.

    A UNet2DModel has one head dimension for all its levels; the published LDM-8 has 8 heads at every width. No
    parameter's shape depends on it, so that from_pretrained and from_config lose it without an error, but keep the
    config's entry: call ``restore_attention_heads`` after them. Raises ValueError for another class of UNet and for
    channels that so many heads do not divide.
    """
    if not isinstance(unet, UNet2DModel):
        raise ValueError(f"a {type(unet).__name__} says in its config how many heads each level has: set them there")
    attentions = {path: module for path, module in unet.named_modules() if isinstance(module, Attention)}
    for path, attention in attentions.items():
        if heads < 1 or attention.inner_dim % heads:
            raise ValueError(f"{path} has {attention.inner_dim} channels, which {heads} heads do not divide")
    for attention in attentions.values():
        attention.heads = attention.sliceable_head_dim = heads
        attention.scale = (attention.inner_dim // heads) ** -0.5
    unet.register_to_config(attention_heads=heads)


def restore_attention_heads(unet: UNet) -> None:
    """Give ``unet``, just made from its config, the heads that ``set_attention_heads`` noted there, if it did."""
    heads = unet.config.get("attention_heads")
    if heads is not None:
        set_attention_heads(unet, heads)


def _doubled(hidden: Tensor) -> tuple[int, int]:
    return 2 * hidden.shape[2], 2 * hidden.shape[3]


def _pairs(
    resnets: nn.ModuleList, attentions: nn.ModuleList | None
) -> Iterator[tuple[ResnetBlock2D, nn.Module | None]]:
    return zip(resnets, attentions or [None] * len(resnets), strict=True)
