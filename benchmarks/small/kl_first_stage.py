"""The first stage of f8 models: a KL autoencoder that maps 64x64 images to 4x8x8 latents and back.

L1 + L2 + perceptual loss, and a little of the divergence from the normal distribution (Rombach et al., 2022,
arXiv:2112.10752), without a discriminator.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.small import training
from benchmarks.small.first_stage import psnr, to_signed, to_uint8
from benchmarks.small.training import TrainingConfig, batch_indices, generator


@dataclass(frozen=True)
class KLConfig(TrainingConfig):
    """The network and its training; the divergence is in nats an image."""

    channels: tuple[int, ...]
    layers_per_block: int
    norm_groups: int
    squared_weight: float
    perceptual_weight: float
    perceptual_images: int
    divergence_weight: float


def build(config: KLConfig) -> AutoencoderKL:
    """The untrained network; four resolutions mean latents at an eighth of the images' side."""
    levels = len(config.channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.channels,
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_groups,
        latent_channels=4,
        sample_size=64,
        scaling_factor=1.0,
    )


@torch.no_grad()
def encode(model: AutoencoderKL, images: Tensor, batch: int = 64) -> Tensor:
    """The means of the latents, float32 [N, 4, H/8, W/8], of uint8 images [N, 3, H, W]."""
    return torch.cat([model.encode(to_signed(part)).latent_dist.mode() for part in images.split(batch)])


@torch.no_grad()
def reconstruct(model: AutoencoderKL, images: Tensor, batch: int = 64) -> Tensor:
    """Encode and decode uint8 images."""
    return torch.cat([to_uint8(model.decode(part).sample) for part in encode(model, images).split(batch)])


def train(
    config: KLConfig, distance: nn.Module, images: Tensor, held_out: Tensor, folder: Path, log_path: Path
) -> AutoencoderKL:
    """Train on uint8 images [N, 3, 64, 64], as `training.train` does; return the averaged weights.

    The returned model scales the latents of `images` to unit deviation.
    """
    torch.manual_seed(config.seed)
    model = build(config)

    def losses(iteration: int) -> dict[str, Tensor]:
        batch = to_signed(images[batch_indices(iteration, config.batch, len(images), config.seed)])
        with torch.autocast("cpu", torch.bfloat16):
            posterior = model.encode(batch).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator(config.seed, iteration))
            decoded = model.decode(posterior.mean + posterior.std * noise).sample.float()
        shown = config.perceptual_images
        terms = {
            "absolute": F.l1_loss(decoded, batch),
            "squared": F.mse_loss(decoded, batch),
            "perceptual": distance(decoded[:shown], batch[:shown]),
            "divergence": posterior.kl().float().mean(),
        }
        loss = (
            terms["absolute"]
            + config.squared_weight * terms["squared"]
            + config.perceptual_weight * terms["perceptual"]
            + config.divergence_weight * terms["divergence"]
        )
        return {"loss": loss} | terms

    def measure(average: AutoencoderKL) -> dict[str, float]:
        return {"psnr": psnr(reconstruct(average, held_out), held_out).mean().item()}

    average = training.train(config, model, losses, folder, log_path, measure)
    average.register_to_config(scaling_factor=1 / encode(average, images).std().item())
    return average
