"""The diffusion transformer: diffusers' DiT (Peebles and Xie, 2023, arXiv:2212.09748) on the latents of emoji-class."""

from dataclasses import dataclass

import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from benchmarks.small.training import TrainingConfig

# The class that stands for none in diffusers' DiTPipeline, which is made for ImageNet's thousand.
NO_CLASS = 1000


@dataclass(frozen=True)
class TransformerConfig(TrainingConfig):
    """Width, a multiple of `head_channels`, and depth; `patch` latents a side make a token.

    A share `dropout` of the images is trained without its class, which guidance needs.
    """

    width: int
    layers: int
    head_channels: int
    patch: int
    dropout: float


class ClassTransformer(nn.Module):
    """A DiT with the arguments of the other denoisers."""

    def __init__(self, transformer: DiTTransformer2DModel) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, latents: Tensor, timesteps: Tensor, classes: Tensor) -> Transformer2DModelOutput:
        """The predicted noise (B, C, H, W) for classes (B,)."""
        return self.transformer(latents, timestep=timesteps, class_labels=classes)


def build(config: TransformerConfig, latent_channels: int) -> DiTTransformer2DModel:
    """The untrained network. It predicts no variance, and each block's last layer begins at zero, as in the paper."""
    transformer = DiTTransformer2DModel(
        num_attention_heads=config.width // config.head_channels,
        attention_head_dim=config.head_channels,
        in_channels=latent_channels,
        out_channels=latent_channels,
        num_layers=config.layers,
        sample_size=8,
        patch_size=config.patch,
        num_embeds_ada_norm=NO_CLASS,
    )
    for block in transformer.transformer_blocks:
        # Each block would drop the class by a lot of its own; `diffusion.train` drops it for all of them.
        block.norm1.emb.class_embedder.dropout_prob = 0.0
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
    for layer in (transformer.proj_out_1, transformer.proj_out_2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    with torch.no_grad():
        for block in transformer.transformer_blocks:
            block.norm1.emb.class_embedder.embedding_table.weight.mul_(0.02)
    return transformer
