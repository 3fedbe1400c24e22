"""diffusers' UNets, block by block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from tfmq.network import unet_features
from tfmq.network.backbone import NO_INPUTS, Backbone, Block
from tfmq.network.conditioning import (
    ADAPTER,
    DOWN,
    MID,
    TEXT_EMBEDS,
    TIMESTEP_COND,
    Inputs,
    added_conditions,
    listed,
    with_channels,
)
from tfmq.network.unet_features import UNet

# Parts that have layers or norms and are no block.
OUTSIDE = ("time_embedding", "add_embedding", "conv_norm_out")


class NoTimeEmbedding(nn.Module):
    """Takes the place of the time-embedding network where nothing needs its output: lets the encoding pass."""

    def forward(self, encoding: Tensor, condition: Tensor | None = None) -> Tensor:
        return encoding


@dataclass(frozen=True)
class UNetBackbone(Backbone):
    """The backbone of a UNet2DModel, or of a UNet2DConditionModel, whose latents go with a context (B, tokens, D).

    The temporal information block is the time-embedding network, and the linear layer in each residual block that
    projects its output. In SDXL conditions are added between the two, so that it is the time-embedding network alone;
    in LCM a condition goes into its first layer, and nothing depends on the time step alone. Downsampling convolutions
    are those of their own: a residual block that downsamples (LDM-8 churches) averages pixels, without weights, and its
    convolutions are those of any residual block.
    """

    @classmethod
    def of(cls, unet: UNet) -> UNetBackbone:
        """See `Backbone`."""
        unet_features.check_features(unet)
        blocks, splits = [], {}
        stack = [unet.conv_in.out_channels]
        blocks.append(Block("conv_in", push=True))
        for i, down in enumerate(unet.down_blocks):
            adapted = (f"{ADAPTER}.{i}",)
            for j, (resnet, attention) in enumerate(_pairs(down.resnets, getattr(down, "attentions", None))):
                blocks.append(Block(f"down_blocks.{i}.resnets.{j}", push=attention is None))
                if attention is not None:
                    blocks.append(Block(f"down_blocks.{i}.attentions.{j}", push=True))
                stack.append(resnet.out_channels)
            # A block with cross-attention adds an adapter's residual before it downsamples, any other behind.
            if getattr(down, "has_cross_attention", False):
                blocks[-1] = replace(blocks[-1], adds=adapted)
            for j, _ in enumerate(down.downsamplers or ()):
                blocks.append(Block(f"down_blocks.{i}.downsamplers.{j}", push=True))
                stack.append(stack[-1])
            if not getattr(down, "has_cross_attention", False):
                blocks[-1] = replace(blocks[-1], adds=adapted)
        channels = stack[-1]
        if unet.mid_block is not None:
            blocks.append(Block("mid_block.resnets.0"))
            for j, attention in enumerate(unet.mid_block.attentions):
                if attention is not None:
                    blocks.append(Block(f"mid_block.attentions.{j}"))
                blocks.append(Block(f"mid_block.resnets.{j + 1}"))
            blocks[-1] = replace(blocks[-1], adds=(f"{ADAPTER}.{len(unet.down_blocks)}", MID))
        for i, up in enumerate(unet.up_blocks):
            for j, (resnet, attention) in enumerate(_pairs(up.resnets, getattr(up, "attentions", None))):
                path = f"up_blocks.{i}.resnets.{j}"
                blocks.append(Block(path, pop=True, pop_adds=f"{DOWN}.{len(stack) - 1}"))
                if resnet.conv_shortcut is not None:
                    splits[f"{path}.conv_shortcut"] = (channels, stack[-1])
                stack.pop()
                if attention is not None:
                    blocks.append(Block(f"up_blocks.{i}.attentions.{j}"))
                channels = resnet.out_channels
            for j, _ in enumerate(up.upsamplers or ()):
                blocks.append(Block(f"up_blocks.{i}.upsamplers.{j}"))
        blocks.append(Block("conv_out"))
        known = tuple(f"{path}." for path in (*(block.path for block in blocks), *OUTSIDE))
        for name, _ in unet.named_parameters():
            if not name.startswith(known):
                raise ValueError(f"the UNet has {name}, which is no part of the blocks and the time embedding")
        modules = dict(unet.named_modules())
        layers = [path for path, module in modules.items() if isinstance(module, nn.Conv2d | nn.Linear)]
        attentions = tuple(path for path, module in modules.items() if isinstance(module, Attention))
        inside = tuple(f"{path}." for path in attentions)
        time_layers: tuple[str, ...] = ("time_embedding.linear_1", "time_embedding.linear_2")
        projections = tuple(
            f"{block.path}.time_emb_proj"
            for block in blocks
            if isinstance(modules[block.path], ResnetBlock2D) and modules[block.path].time_emb_proj is not None
        )
        time_embedding, time_projections = time_layers, projections
        condition_embedding = tuple(path for path in layers if path.startswith("add_embedding."))
        if unet.config.get("time_cond_proj_dim") is not None:  # a condition goes into the first layer
            time_embedding, time_projections = (), ()
            condition_embedding = ("time_embedding.cond_proj", *time_layers, *condition_embedding)
        elif condition_embedding:  # conditions are added to the second layer's output
            time_embedding, time_projections = time_layers[:1], time_layers[1:]
        return cls(
            blocks=tuple(blocks),
            time_embedding=time_embedding,
            time_projections=time_projections,
            attentions=attentions,
            roles={
                "boundary": ("conv_in", "conv_out"),
                "first_time_layer": time_layers[:1],
                "second_time_layer": time_layers[1:],
                "first_block_convolution": ("down_blocks.0.resnets.0.conv1",),
                "time_embedding": time_layers,
                "time_projections": projections,
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
            condition_embedding=condition_embedding,
        )

    @staticmethod
    def known_arguments(network: UNet) -> frozenset[str]:
        """See `Backbone`."""
        return unet_features.known_arguments(network)

    @staticmethod
    def required_inputs(network: UNet) -> tuple[str, ...]:
        """See `Backbone`."""
        return tuple(unet_features.input_widths(network))

    @staticmethod
    def known_inputs(network: UNet) -> tuple[str, ...]:
        """See `Backbone`."""
        return unet_features.known_inputs(network)

    @staticmethod
    def evaluate(
        network: UNet, latents: Tensor, timesteps: Tensor, context: Tensor | None, inputs: Inputs = NO_INPUTS
    ) -> Tensor:
        """See `Backbone`."""
        if not inputs:
            return network(latents, timesteps, *(() if context is None else (context,))).sample
        return network(
            with_channels(latents, inputs),
            timesteps,
            context,
            timestep_cond=inputs.get(TIMESTEP_COND),
            added_cond_kwargs=added_conditions(inputs),
            down_block_additional_residuals=listed(inputs, DOWN),
            mid_block_additional_residual=inputs.get(MID),
            down_intrablock_additional_residuals=_copies(listed(inputs, ADAPTER)),
        ).sample

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

    def random_inputs(
        self, network: UNet, rows: int, device: torch.device, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """See `Backbone`."""
        widths = unet_features.input_widths(network)
        return {name: torch.randn(rows, width, device=device, generator=generator) for name, width in widths.items()}

    def encoding(self, network: UNet, timesteps: Tensor) -> Tensor:
        """See `Backbone`."""
        return network.time_proj(timesteps)

    def time_input(self, network: UNet, timesteps: Tensor, inputs: Inputs = NO_INPUTS) -> Tensor:
        """See `Backbone`: the sinusoidal encoding through the time-embedding network, and what conditions add."""
        encoding = self.encoding(network, timesteps).to(network.dtype)
        if not self.condition_embedding:
            return network.time_embedding(encoding)
        embedding = network.time_embedding(encoding, inputs.get(TIMESTEP_COND))
        if TEXT_EMBEDS not in inputs:
            return embedding
        conditions = added_conditions(inputs)
        return embedding + network.get_aug_embed(embedding, encoder_hidden_states=None, added_cond_kwargs=conditions)

    def temporal_features(self, network: UNet, timesteps: Tensor) -> list[Tensor]:
        """See `Backbone`."""
        if not self.time_projections:
            return []
        if self.condition_embedding:
            embed = network.time_embedding
            encoding = self.encoding(network, timesteps).to(network.dtype)
            return [embed.linear_2(embed.act(embed.linear_1(encoding)))]
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
        if self.condition_embedding:  # the table of the second layer stays
            network.time_embedding.linear_1 = nn.Identity()
        else:
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
        for embedding in {path.rpartition(".")[0] for path in self.embedding}:
            if isinstance(network.get_submodule(embedding).act, nn.SiLU):
                paths.add(f"{embedding}.linear_2")
        if network.conv_norm_out is not None and isinstance(network.conv_act, nn.SiLU):
            paths.add("conv_out")
        return paths


def _doubled(hidden: Tensor) -> tuple[int, int]:
    return 2 * hidden.shape[2], 2 * hidden.shape[3]


def _copies(residuals: list[Tensor] | None) -> list[Tensor] | None:
    """A list of their own, since a UNet takes an adapter's residuals out of it."""
    return None if residuals is None else list(residuals)


def _pairs(
    resnets: nn.ModuleList, attentions: nn.ModuleList | None
) -> Iterator[tuple[ResnetBlock2D, nn.Module | None]]:
    return zip(resnets, attentions or [None] * len(resnets), strict=True)
