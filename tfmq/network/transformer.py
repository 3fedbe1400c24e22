"""diffusers' diffusion transformer (DiT, Peebles and Xie, ICCV 2023, arXiv 2212.09748), block by block.

Every block has a time-embedding network of its own, whose output is added to the embedding of the class; the sum is
projected to the shifts, scales and gates of the block (adaLN-Zero). So the two linear layers of the time embedding
depend on the time step alone, and the projections (role ``modulation``) on time step and class.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from tfmq.network.backbone import NO_INPUTS, Backbone, Block
from tfmq.network.conditioning import Inputs

EMBEDDER = "norm1.emb.timestep_embedder"


@dataclass(frozen=True)
class TransformerBackbone(Backbone):
    """The backbone of a DiTTransformer2DModel; classes (B,) go with the latents."""

    @classmethod
    def of(cls, network: DiTTransformer2DModel) -> TransformerBackbone:
        """See `Backbone`."""
        blocks = [f"transformer_blocks.{i}" for i in range(len(network.transformer_blocks))]
        last = Block("proj_out_2", also=("proj_out_1", "norm_out"))
        steps = (Block("pos_embed"), *map(Block, blocks), last)
        for name, _ in network.named_parameters():
            if not any(step.holds(name) for step in steps):
                raise ValueError(f"the transformer has {name}, which is no part of its blocks")
        modules = dict(network.named_modules())
        attentions = tuple(path for path, module in modules.items() if isinstance(module, Attention))
        inside = tuple(f"{path}." for path in attentions)
        layers = [path for path, module in modules.items() if isinstance(module, nn.Conv2d | nn.Linear)]
        first = tuple(f"{block}.{EMBEDDER}.linear_1" for block in blocks)
        second = tuple(f"{block}.{EMBEDDER}.linear_2" for block in blocks)
        return cls(
            blocks=steps,
            time_embedding=first,
            time_projections=second,
            attentions=attentions,
            roles={
                "boundary": ("pos_embed.proj", "proj_out_2"),
                "first_time_layer": first,
                "second_time_layer": second,
                "first_block_convolution": (),
                "time_embedding": first,
                "time_projections": second,
                "modulation": (*(f"{block}.norm1.linear" for block in blocks), "proj_out_1"),
                "shortcuts": (),
                "downsampling": (),
                "attention_layers": tuple(path for path in layers if path.startswith(inside)),
                "attention_products": attentions,
            },
            shortcut_splits={},
            condition="class",
        )

    @staticmethod
    def known_arguments(network: DiTTransformer2DModel) -> frozenset[str]:
        """See `Backbone`."""
        return frozenset({"hidden_states", "timestep", "class_labels", "return_dict"})

    @staticmethod
    def evaluate(
        network: DiTTransformer2DModel,
        latents: Tensor,
        timesteps: Tensor,
        context: Tensor | None,
        inputs: Inputs = NO_INPUTS,
    ) -> Tensor:
        """See `Backbone`."""
        steps = timesteps.to(latents.device).expand(len(latents))
        # A network that predicts the variance too has its channels behind those of the noise.
        return network(latents, timestep=steps, class_labels=context).sample[:, : latents.shape[1]]

    def random_condition(
        self,
        network: DiTTransformer2DModel,
        rows: int,
        tokens: int,
        device: torch.device,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """See `Backbone`: classes, the one that means none among them."""
        return torch.randint(network.config.num_embeds_ada_norm + 1, (rows,), device=device, generator=generator)

    def encoding(self, network: DiTTransformer2DModel, timesteps: Tensor) -> Tensor:
        """See `Backbone`."""
        return network.transformer_blocks[0].norm1.emb.time_proj(timesteps)

    def time_input(self, network: DiTTransformer2DModel, timesteps: Tensor, inputs: Inputs = NO_INPUTS) -> Tensor:
        """See `Backbone`."""
        return timesteps

    def temporal_features(self, network: DiTTransformer2DModel, timesteps: Tensor) -> list[Tensor]:
        """See `Backbone`."""
        encoding = self.encoding(network, timesteps).to(network.dtype)
        return [block.norm1.emb.timestep_embedder(encoding) for block in network.transformer_blocks]

    def run_block(
        self,
        network: DiTTransformer2DModel,
        block: Block,
        hidden: Tensor,
        time: Tensor,
        context: Tensor | None,
        size: torch.Size | None = None,
    ) -> Tensor:
        """See `Backbone`."""
        module = network.get_submodule(block.path)
        if block.path == "pos_embed":
            return module(hidden)
        if block.path != "proj_out_2":
            return module(hidden, timestep=time, class_labels=context)
        embedding = network.transformer_blocks[0].norm1.emb(time, context, hidden_dtype=hidden.dtype)
        shift, scale = network.proj_out_1(F.silu(embedding)).chunk(2, dim=1)
        hidden = module(network.norm_out(hidden) * (1 + scale[:, None]) + shift[:, None])
        side, patch = int(hidden.shape[1] ** 0.5), network.config.patch_size
        pixels = hidden.unflatten(2, (patch, patch, network.out_channels)).unflatten(1, (side, side))
        return pixels.permute(0, 5, 1, 3, 2, 4).reshape(len(hidden), network.out_channels, side * patch, side * patch)

    @staticmethod
    def check_size(network: DiTTransformer2DModel, height: int, width: int) -> None:
        """See `Backbone`. diffusers puts the patches together to a square, whatever they were cut from."""
        patch = network.config.patch_size
        if height != width or height % patch:
            raise ValueError(
                f"latents of {height}x{width}: a {type(network).__name__} takes squares of a multiple of {patch}, the "
                "size of its patches"
            )

    def drop_time_embedding(self, network: DiTTransformer2DModel) -> None:
        """See `Backbone`."""
        for path in self.time_embedding:
            network.set_submodule(path, nn.Identity())

    def silu_inputs(self, network: DiTTransformer2DModel) -> set[str]:
        """See `Backbone`."""
        embedders = {path for path in self.time_projections if isinstance(_activation(network, path), nn.SiLU)}
        return {*embedders, *self.roles["modulation"]}


def _activation(network: DiTTransformer2DModel, path: str) -> nn.Module:
    return network.get_submodule(path.rpartition(".")[0]).act
