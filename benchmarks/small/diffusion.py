"""The denoiser: a UNet trained to predict the noise in latents of the first stage.

Schedule and objective are those of latent diffusion (Rombach et al., 2022, arXiv:2112.10752).
"""

import copy
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.small.training import (
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
class DiffusionConfig:
    """The network and its training; `export_every` iterations the averaged weights are handed on."""

    channels: tuple[int, ...] = (64, 96, 128)
    layers_per_block: int = 2
    head_channels: int = 32
    norm_groups: int = 32
    iterations: int = 7000
    batch: int = 64
    peak_rate: float = 5e-4
    warm_up: int = 300
    average_decay: float = 0.999
    log_every: int = 100
    save_every: int = 500
    export_every: int = 1000
    seed: int = 0


def build(config: DiffusionConfig) -> UNet2DModel:
    """The untrained network: attention at every resolution but the first, and in the middle."""
    attended = len(config.channels) - 1
    return UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=config.channels,
        down_block_types=("DownBlock2D",) + ("AttnDownBlock2D",) * attended,
        up_block_types=("AttnUpBlock2D",) * attended + ("UpBlock2D",),
        layers_per_block=config.layers_per_block,
        attention_head_dim=config.head_channels,
        norm_num_groups=config.norm_groups,
        time_embedding_type="positional",
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
    config: DiffusionConfig,
    latents: Tensor,
    folder: Path,
    log_path: Path,
    export: Callable[[UNet2DModel], None],
) -> UNet2DModel:
    """Train on latents [N, 3, 8, 8] of about unit variance, or go on where `folder`/checkpoint.pt stopped.

    `export` receives the averaged weights before the first iteration, now and then, and at the end; they are returned.
    """
    torch.manual_seed(config.seed)
    model = build(config)
    average = copy.deepcopy(model).requires_grad_(False)
    scheduler = build_scheduler()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=0.0)
    start, seconds = 0, 0.0
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        state = load_checkpoint(checkpoint)
        if state["config"] != asdict(config):
            raise ValueError(f"{checkpoint} was written under other settings; remove it to start anew.")
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        start, seconds = state["iteration"], state["seconds"]
    start_log(log_path, start)
    export(average)
    began = time.perf_counter() - seconds
    total = 0.0
    for iteration in range(start, config.iterations):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(iteration, config.iterations, config.warm_up, config.peak_rate)
        clean = latents[batch_indices(iteration, config.batch, len(latents), config.seed)]
        source = generator(config.seed, iteration)
        noise = torch.randn(clean.shape, generator=source)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(clean),), generator=source)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        with torch.autocast("cpu", torch.bfloat16):
            predicted = model(noisy, timesteps).sample
        loss = F.mse_loss(predicted.float(), noise)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"The loss is {loss.item()} at iteration {iteration}.")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        update_average(average, model, iteration, config.average_decay)
        total += loss.item()
        done = iteration + 1
        if done % config.log_every == 0 or done == config.iterations:
            seconds = time.perf_counter() - began
            # The loss of one batch is mostly the chance of its time steps, so that the log holds means.
            log(log_path, {"iteration": done, "seconds": seconds, "loss": total / ((done - 1) % config.log_every + 1)})
            total = 0.0
        if done % config.save_every == 0 or done == config.iterations:
            state = {
                "config": asdict(config),
                "iteration": done,
                "seconds": seconds,
                "model": model.state_dict(),
                "average": average.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            save_checkpoint(checkpoint, state)
        if done % config.export_every == 0 or done == config.iterations:
            export(average)
    return average
