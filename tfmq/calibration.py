"""The calibration pool: what a full-precision sampling pass feeds the UNet, from which every method draws its rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import SchedulerMixin
from torch import Tensor
from tqdm.auto import tqdm

from tfmq.sampling import Conditioning, SamplingSettings, Step, sample
from tfmq.unet import UNet


@dataclass(frozen=True)
class CalibrationRows:
    """UNet inputs drawn from a pool.

    Attributes:
        latents: float32 (N, C, H, W).
        timesteps: int64 (N,).
        context: (N, tokens, D), or None for an unconditional UNet.
    """

    latents: Tensor
    timesteps: Tensor
    context: Tensor | None = None

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, rows: Tensor | slice) -> CalibrationRows:
        context = None if self.context is None else self.context[rows]
        return CalibrationRows(self.latents[rows], self.timesteps[rows], context)

    def to(self, device: torch.device) -> CalibrationRows:
        """The rows with latents and context on ``device``; time steps stay where they are."""
        context = None if self.context is None else self.context.to(device)
        return CalibrationRows(self.latents.to(device), self.timesteps, context)

    def shuffled(self, generator: torch.Generator) -> CalibrationRows:
        return self[torch.randperm(len(self), generator=generator)]


@dataclass(frozen=True)
class CalibrationSet:
    """The pool: inputs of every step of one full-precision sampling pass over some images.

    Attributes:
        latents: float32 (steps, images, C, H, W), noisiest step first.
        timesteps: int64 (steps,), the finite set of the schedule.
        context: (images, tokens, D) or None.
        unconditional: (images, tokens, D) or None; where given, drawn rows hold both halves of guidance.
    """

    latents: Tensor
    timesteps: Tensor
    context: Tensor | None = None
    unconditional: Tensor | None = None

    @property
    def steps(self) -> int:
        return self.latents.shape[0]

    @property
    def images(self) -> int:
        return self.latents.shape[1]

    def spaced(self, steps: int, images: int) -> CalibrationRows:
        """The first ``images`` images at ``steps`` uniformly spaced steps from the noisiest, ordered by step.

        Q-Diffusion's draw (arXiv 2302.04304, section 4.1). More than the pool holds is cut to what it holds.
        """
        steps, images = min(steps, self.steps), min(images, self.images)
        chosen = torch.arange(steps) * self.steps // steps
        latents = self.latents[chosen, :images].flatten(0, 1)
        timesteps = self.timesteps[chosen].repeat_interleave(images)
        if self.context is None:
            return CalibrationRows(latents, timesteps)
        context = self.context[:images].repeat(steps, 1, 1)
        if self.unconditional is None:
            return CalibrationRows(latents, timesteps, context)
        unconditional = self.unconditional[:images].repeat(steps, 1, 1)
        return CalibrationRows(latents.repeat(2, 1, 1, 1), timesteps.repeat(2), torch.cat([context, unconditional]))


def collect_calibration(
    unet: UNet,
    scheduler: SchedulerMixin,
    noise: Tensor,
    settings: SamplingSettings,
    *,
    batch: int,
    conditioning: Conditioning | None = None,
    step_noise: Tensor | None = None,
) -> CalibrationSet:
    """Record the pool in one sampling pass over ``noise`` (N, C, H, W): T UNet evaluations an image for T steps."""
    latents, timesteps = [], []
    for start in tqdm(range(0, len(noise), batch), desc="calibration pool", disable=None):
        rows = slice(start, start + batch)
        part = None
        if conditioning is not None:
            unconditional = conditioning.unconditional
            part = Conditioning(conditioning.context[rows], None if unconditional is None else unconditional[rows])
        recorded: list[Step] = []
        sample(
            unet,
            scheduler,
            noise[rows],
            settings,
            conditioning=part,
            step_noise=None if step_noise is None else step_noise[:, rows],
            callback=recorded.append,
        )
        latents.append(torch.stack([step.latents for step in recorded]).cpu())
        timesteps = [step.timestep for step in recorded]
    return CalibrationSet(
        latents=torch.cat(latents, 1),
        timesteps=torch.tensor(timesteps),
        context=_on_cpu(conditioning and conditioning.context),
        unconditional=_on_cpu(conditioning and conditioning.unconditional),
    )


def _on_cpu(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.cpu()
