"""What is where in a diffusers UNet, by module path, and running it block by block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

UNet = UNet2DModel | UNet2DConditionModel


@dataclass(frozen=True)
class Block:
    """One step of the UNet's forward pass: the module at ``path`` maps the hidden state to the next.

    ``pop`` concatenates the top of the skip stack to the input first; ``push`` puts the output on that stack.
    """

    path: str
    pop: bool = False
    push: bool = False


@dataclass(frozen=True)
class UNetLayout:
    """The parts of a UNet, all by module path.

    Attributes:
        blocks: in forward order, from the input convolution to the output convolution.
        time_embedding: the linear layers of the time-embedding network.
        time_projections: the linear layer in each residual block that projects the time embedding, those that down- or
            upsample included.
        shortcut_splits: shortcut convolutions over concatenated features -> channels (decoder, skip).
        attentions: attention modules.
        shortcuts: shortcut convolutions of residual blocks.
        downsampling: convolutions that downsample. A residual block that downsamples (LDM-8 churches) averages pixels,
            without weights; its convolutions are those of any residual block, and not among these.
        attention_layers: the linear layers inside attention modules.
        boundary: the first and the last layer of the network.
    """

    blocks: tuple[Block, ...]
    time_embedding: tuple[str, ...]
    time_projections: tuple[str, ...]
    shortcut_splits: dict[str, tuple[int, int]] = field(hash=False)
    attentions: tuple[str, ...]
    shortcuts: tuple[str, ...]
    downsampling: tuple[str, ...]
    attention_layers: tuple[str, ...]
    boundary: tuple[str, ...] = ("conv_in", "conv_out")

    @classmethod
    def of(cls, unet: UNet) -> UNetLayout:
        """Read the layout of a UNet2DModel or UNet2DConditionModel.

        Raises ValueError for other classes and for parts that the block-by-block pass would not reproduce.
        """
        if not isinstance(unet, UNet2DModel | UNet2DConditionModel):
            raise ValueError(f"{type(unet).__name__} is not supported: give a UNet2DModel or a UNet2DConditionModel")
        time_act = getattr(unet, "time_embed_act", None)
        if unet.config.center_input_sample or time_act is not None or unet.config.time_embedding_type != "positional":
            raise ValueError("only UNets with a positional time embedding and an uncentred input are supported")
        blocks, splits = [], {}
        stack = [unet.conv_in.out_channels]
        blocks.append(Block("conv_in", push=True))
        for i, down in enumerate(unet.down_blocks):
            for j, (resnet, attention) in enumerate(_pairs(down)):
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
            for j, (resnet, attention) in enumerate(_pairs(up)):
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
        return cls(
            blocks=tuple(blocks),
            time_embedding=("time_embedding.linear_1", "time_embedding.linear_2"),
            time_projections=tuple(
                f"{block.path}.time_emb_proj"
                for block in blocks
                if isinstance(modules[block.path], ResnetBlock2D) and modules[block.path].time_emb_proj is not None
            ),
            shortcut_splits=splits,
            attentions=attentions,
            shortcuts=tuple(path for path in layers if path.endswith(".conv_shortcut")),
            downsampling=tuple(
                path
                for path in layers
                if ".downsamplers." in path and isinstance(modules[path.rpartition(".")[0]], Downsample2D)
            ),
            attention_layers=tuple(path for path in layers if path.startswith(tuple(f"{a}." for a in attentions))),
        )

    @property
    def roles(self) -> dict[str, tuple[str, ...]]:
        """Paths of the layers, or attention modules, by the roles that a protocol may treat in its own way."""
        return {
            "boundary": self.boundary,
            "first_time_layer": self.time_embedding[:1],
            "time_embedding": self.time_embedding,
            "time_projections": self.time_projections,
            "shortcuts": self.shortcuts,
            "downsampling": self.downsampling,
            "attention_layers": self.attention_layers,
            "attention_products": self.attentions,
        }

    @property
    def temporal(self) -> tuple[str, ...]:
        """The temporal information block of TFMQ-DM: all layers that depend on the time step alone."""
        return self.time_embedding + self.time_projections


def set_attention_heads(unet: UNet2DModel, heads: int) -> None:
    """Give every attention of ``unet`` so many heads, in place, and note it in the UNet's config.

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


def _pairs(stage: nn.Module) -> Iterator[tuple[ResnetBlock2D, nn.Module | None]]:
    attentions = getattr(stage, "attentions", None) or [None] * len(stage.resnets)
    return zip(stage.resnets, attentions, strict=True)


def time_features(unet: UNet, timesteps: Tensor) -> Tensor:
    """Time embedding (N, D) of time steps (N,): the sinusoidal encoding through the time-embedding network."""
    encoding = unet.time_proj(timesteps).to(unet.dtype)
    return unet.time_embedding(encoding)


def temporal_features(unet: UNet, layout: UNetLayout, timesteps: Tensor) -> list[Tensor]:
    """What the time step contributes to each residual block: (N, C_i) for each of ``layout.time_projections``.

    These are the emb_{t,i} of TFMQ-DM (arXiv 2311.16503, eq. 3), the outputs of the temporal information block.
    """
    embedding = time_features(unet, timesteps)
    features = []
    for path in layout.time_projections:
        resnet = unet.get_submodule(path.rpartition(".")[0])
        activated = embedding if resnet.skip_time_act else resnet.nonlinearity(embedding)
        features.append(resnet.time_emb_proj(activated))
    return features


def run_block(unet: UNet, block: Block, hidden: Tensor, embedding: Tensor, context: Tensor | None) -> Tensor:
    """Output of one block for hidden state (B, C, H, W), time embedding (B, D) and context (B, tokens, D) or None."""
    module = unet.get_submodule(block.path)
    if isinstance(module, ResnetBlock2D):
        return module(hidden, embedding)
    if isinstance(module, Transformer2DModel):
        return module(hidden, encoder_hidden_states=context, return_dict=False)[0]
    if block.path == "conv_out":
        if unet.conv_norm_out is not None:
            hidden = unet.conv_act(unet.conv_norm_out(hidden))
        return module(hidden)
    return module(hidden)


def full_precision_bytes(unet: UNet) -> int:
    """Size of the network's parameters at 32 bits, in bytes."""
    return sum(parameter.numel() * 4 for parameter in unet.parameters())
