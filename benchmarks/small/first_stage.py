"""The first stage: a VQ autoencoder that maps 32x32 images to 3x8x8 latents and back.

L1 + L2 + perceptual loss. The first iterations train without a codebook; the codebook then starts from encoded images
and follows them as k-means with exponential averages (van den Oord et al., 2017, arXiv:1711.00937, appendix A.1).
"""

import copy
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import VQModel
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.small.training import (
    TrainingConfig,
    batch_indices,
    generator,
    learning_rate,
    load_checkpoint,
    log,
    save_checkpoint,
    start_log,
    update_average,
)


@dataclass(frozen=True)
class FirstStageConfig(TrainingConfig):
    """The network and its training. Iterations count from 0; `quantize_from` and `restart_until` are among them."""

    channels: tuple[int, ...]
    layers_per_block: int
    norm_groups: int
    codes: int
    squared_weight: float
    perceptual_weight: float
    perceptual_images: int
    commitment_weight: float
    quantize_from: int
    restart_until: int
    restart_every: int
    codebook_decay: float


def build(config: FirstStageConfig) -> VQModel:
    """The untrained network; three resolutions mean latents at a quarter of the images' side."""
    levels = len(config.channels)
    return VQModel(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.channels,
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_groups,
        latent_channels=3,
        sample_size=32,
        num_vq_embeddings=config.codes,
        scaling_factor=1.0,
    )


class Codebook:
    """The codes of a VQ model and the averages they follow."""

    def __init__(self, codes: Tensor, decay: float) -> None:
        self.codes = codes
        self.decay = decay
        self.counts = torch.ones(len(codes))
        self.sums = codes.clone()

    def nearest(self, vectors: Tensor) -> Tensor:
        """The index of each vector's nearest code: [N, D] -> [N]."""
        # |v|^2 is the same for every code and does not change which is nearest.
        return (self.codes.square().sum(dim=1) - 2 * vectors @ self.codes.T).argmin(dim=1)

    def start(self, vectors: Tensor, source: torch.Generator) -> None:
        """Put every code on one of the vectors."""
        chosen = torch.randint(len(vectors), (len(self.codes),), generator=source)
        self.codes.copy_(vectors[chosen])
        self.counts.fill_(1.0)
        self.sums.copy_(self.codes)

    def update(self, vectors: Tensor, indices: Tensor) -> None:
        """Move each code towards the mean of the vectors that chose it."""
        counts = torch.bincount(indices, minlength=len(self.codes)).float()
        sums = torch.zeros_like(self.sums).index_add_(0, indices, vectors)
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        self.codes.copy_(self.sums / self.counts.clamp(min=1e-5)[:, None])

    def restart(self, vectors: Tensor, source: torch.Generator) -> int:
        """Put the codes that a tenth of the average share of vectors choose, or fewer, on vectors; return how many."""
        dead = self.counts < 0.1 * self.counts.mean()
        chosen = torch.randint(len(vectors), (int(dead.sum()),), generator=source)
        self.counts[dead] = self.counts.mean()
        self.codes[dead] = vectors[chosen]
        self.sums[dead] = vectors[chosen] * self.counts.mean()
        return len(chosen)


def to_signed(images: Tensor) -> Tensor:
    """Uint8 images as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1], clamped and rounded, as uint8."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


@torch.no_grad()
def encode(model: VQModel, images: Tensor, batch: int = 64) -> Tensor:
    """Latents before quantisation, float32 [N, 3, H/4, W/4], of uint8 images [N, 3, H, W]."""
    return torch.cat([model.encode(to_signed(part)).latents for part in images.split(batch)])


@torch.no_grad()
def reconstruct(model: VQModel, images: Tensor, quantize: bool = True, batch: int = 64) -> Tensor:
    """Encode and decode uint8 images; without `quantize` the latents skip the codebook."""
    parts = [
        to_uint8(model.decode(model.encode(to_signed(part)).latents, force_not_quantize=not quantize).sample)
        for part in images.split(batch)
    ]
    return torch.cat(parts)


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each uint8 image in dB, [N]; identical images count as 0.01 squared levels off."""
    error = (images.float() - reference.float()).square().mean(dim=(1, 2, 3)).clamp(min=0.01)
    return 10 * torch.log10(255.0**2 / error)


def train(
    config: FirstStageConfig, distance: nn.Module, images: Tensor, held_out: Tensor, folder: Path, log_path: Path
) -> VQModel:
    """Train on uint8 images [N, 3, 32, 32], or go on where `folder`/checkpoint.pt stopped; return averaged weights."""
    torch.manual_seed(config.seed)
    model = build(config)
    average = copy.deepcopy(model).requires_grad_(False)
    codes = model.quantize.embedding.weight.requires_grad_(False)
    codebook = Codebook(codes.data, config.codebook_decay)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.99), weight_decay=0.0)
    start, seconds = 0, 0.0
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        state = load_checkpoint(checkpoint)
        if state["config"] != asdict(config):
            raise ValueError(f"{checkpoint} was written under other settings; remove it to start anew.")
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        codebook.counts.copy_(state["counts"])
        codebook.sums.copy_(state["sums"])
        start, seconds = state["iteration"], state["seconds"]
    start_log(log_path, start)
    began = time.perf_counter() - seconds
    for iteration in range(start, config.iterations):
        if iteration == config.quantize_from:
            vectors = _vectors(encode(model, images))
            codebook.start(vectors, generator(config.seed, iteration))
            average.quantize.load_state_dict(model.quantize.state_dict())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(iteration, config.iterations, config.warm_up, config.peak_rate)
        batch = to_signed(images[batch_indices(iteration, config.batch, len(images), config.seed)])
        with torch.autocast("cpu", torch.bfloat16):
            latents = model.encode(batch).latents.float()
        quantized, commitment = latents, torch.zeros(())
        if iteration >= config.quantize_from:
            vectors = _vectors(latents.detach())
            indices = codebook.nearest(vectors)
            chosen = codebook.codes[indices].unflatten(0, (len(batch), *latents.shape[2:])).permute(0, 3, 1, 2)
            commitment = F.mse_loss(latents, chosen)
            quantized = latents + (chosen - latents).detach()
            codebook.update(vectors, indices)
            if iteration < config.restart_until and iteration % config.restart_every == 0:
                codebook.restart(vectors, generator(config.seed, iteration))
        with torch.autocast("cpu", torch.bfloat16):
            decoded = model.decode(quantized, force_not_quantize=True).sample.float()
        absolute = F.l1_loss(decoded, batch)
        squared = F.mse_loss(decoded, batch)
        perceptual = distance(decoded[: config.perceptual_images], batch[: config.perceptual_images])
        loss = (
            absolute
            + config.squared_weight * squared
            + config.perceptual_weight * perceptual
            + config.commitment_weight * commitment
        )
        if not torch.isfinite(loss):
            raise FloatingPointError(f"The loss is {loss.item()} at iteration {iteration}.")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        update_average(average, model, iteration, config.average_decay)
        done = iteration + 1
        if done % config.log_every == 0 or done == config.iterations:
            seconds = time.perf_counter() - began
            entry = {
                "iteration": done,
                "seconds": seconds,
                "absolute": absolute.item(),
                "squared": squared.item(),
                "perceptual": perceptual.item(),
                "commitment": commitment.item(),
            }
            if done % config.save_every == 0 or done == config.iterations:
                quantize = done > config.quantize_from
                entry["psnr"] = psnr(reconstruct(average, held_out, quantize), held_out).mean().item()
                entry["latent_deviation"] = latents.std().item()
                entry["codes_used"] = float((codebook.counts > 0.1 * codebook.counts.mean()).sum())
                state = {
                    "config": asdict(config),
                    "iteration": done,
                    "seconds": seconds,
                    "model": model.state_dict(),
                    "average": average.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "counts": codebook.counts,
                    "sums": codebook.sums,
                }
                save_checkpoint(checkpoint, state)
            log(log_path, entry)
    return average


def _vectors(latents: Tensor) -> Tensor:
    return latents.permute(0, 2, 3, 1).flatten(0, 2)
