"""The denoisers: UNets trained to predict the noise in latents of a first stage.

Schedule and objective are those of latent diffusion (Rombach et al., 2022, arXiv:2112.10752).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.small import training
from benchmarks.small.training import TrainingConfig, batch_indices, generator


@dataclass(frozen=True)
class DiffusionConfig(TrainingConfig):
    """The network and its training."""

    channels: tuple[int, ...]
    layers_per_block: int
    head_channels: int
    norm_groups: int


@dataclass(frozen=True)
class ConditionalConfig(DiffusionConfig):
    """A network that sees a context of `context_channels`; a share `dropout` of the images is trained without it."""

    context_channels: int
    dropout: float


@dataclass(frozen=True)
class Conditions:
    """What each image is conditioned on, [N, ...], and what stands for nothing, [...]."""

    each: Tensor
    null: Tensor


def build(config: DiffusionConfig, latent_channels: int) -> UNet2DModel:
    """The untrained unconditional network: attention at every resolution but the first, and in the middle."""
    attended = len(config.channels) - 1
    return UNet2DModel(
        sample_size=8,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=config.channels,
        down_block_types=("DownBlock2D",) + ("AttnDownBlock2D",) * attended,
        up_block_types=("AttnUpBlock2D",) * attended + ("UpBlock2D",),
        layers_per_block=config.layers_per_block,
        attention_head_dim=config.head_channels,
        norm_num_groups=config.norm_groups,
        time_embedding_type="positional",
    )


def build_conditional(config: ConditionalConfig, latent_channels: int) -> UNet2DConditionModel:
    """The untrained conditional network: transformers at every resolution but the first, and in the middle."""
    attended = len(config.channels) - 1
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=config.channels,
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * attended,
        up_block_types=("CrossAttnUpBlock2D",) * attended + ("UpBlock2D",),
        layers_per_block=config.layers_per_block,
        # Despite its name, diffusers takes this as the number of heads.
        attention_head_dim=tuple(channels // config.head_channels for channels in config.channels),
        norm_num_groups=config.norm_groups,
        cross_attention_dim=config.context_channels,
    )


def build_scheduler() -> DDIMScheduler:
    """The schedule of latent diffusion: betas from 0.0015 to 0.0195, evenly spaced in their square roots."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.0015,
        beta_end=0.0195,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def train(
    config: TrainingConfig,
    model: nn.Module,
    latents: Tensor,
    folder: Path,
    log_path: Path,
    export: Callable[[nn.Module], dict[str, float]],
    conditions: Conditions | None = None,
) -> nn.Module:
    """Train on latents [N, C, H, W] of about unit variance, as `training.train` does; return the averaged weights.

    `model` maps noisy latents, time steps and, with `conditions`, those of the images to an object whose `sample` is
    the predicted noise. With `conditions`, `config` has to have a `dropout`.
    """
    scheduler = build_scheduler()

    def losses(iteration: int) -> dict[str, Tensor]:
        chosen = batch_indices(iteration, config.batch, len(latents), config.seed)
        clean = latents[chosen]
        source = generator(config.seed, iteration)
        noise = torch.randn(clean.shape, generator=source)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(clean),), generator=source)
        inputs = [scheduler.add_noise(clean, noise, timesteps), timesteps]
        if conditions is not None:
            given = conditions.each[chosen]
            given[torch.rand(len(given), generator=source) < config.dropout] = conditions.null
            inputs.append(given)
        with torch.autocast("cpu", torch.bfloat16):
            predicted = model(*inputs).sample
        return {"loss": F.mse_loss(predicted.float(), noise)}

    return training.train(config, model, losses, folder, log_path, export)
