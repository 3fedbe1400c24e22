"""DDIM over time steps whose square roots are evenly spaced: the steps of DDIM's own CIFAR-10 samples."""

from __future__ import annotations

import numpy
import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from torch import Tensor

# The steps reach to this share of the training schedule.
REACH = 0.8


class QuadDDIMScheduler(DDIMScheduler):
    """DDIM (arXiv 2010.02502) at the time steps int(s^2), s evenly spaced from 0 to the square root of 0.8 T.

    Many steps crowd at the clean end and some come several times: as in the published code, that step then leaves the
    image as it is, and the last of them goes on. `step` therefore counts, and has to be called for each of the time
    steps in order after `set_timesteps`.
    """

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        if self.config.prediction_type != "epsilon" or self.config.clip_sample or self.config.thresholding:
            raise ValueError("quadratic steps are for models that predict noise, unclipped: take the scheduler ddim")
        roots = numpy.linspace(0, numpy.sqrt(REACH * self.config.num_train_timesteps), num_inference_steps)
        timesteps = torch.tensor([int(root) for root in roots**2][::-1])
        # Cumulative alpha after each step.
        self._next_alphas = torch.cat([self.alphas_cumprod[timesteps[1:]], self.final_alpha_cumprod.reshape(1)])
        self._position = 0
        self.num_inference_steps = num_inference_steps
        self.timesteps = timesteps.to(device)

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | int,
        sample: Tensor,
        eta: float = 0.0,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """One step, with equation 12 of the paper. Raises ValueError out of order, or for eta > 0 without noise."""
        if self._position >= len(self.timesteps) or int(timestep) != int(self.timesteps[self._position]):
            raise ValueError(f"time step {int(timestep)} is not the schedule's next: take its steps in order")
        if eta > 0 and variance_noise is None:
            raise ValueError(f"eta is {eta}: give variance_noise, the noise that the step adds")
        alpha, after = self.alphas_cumprod[int(timestep)], self._next_alphas[self._position]
        self._position += 1
        original = (sample - (1 - alpha).sqrt() * model_output) / alpha.sqrt()
        sigma = eta * ((1 - alpha / after) * (1 - after) / (1 - alpha)).sqrt()
        previous = after.sqrt() * original + (1 - after - sigma**2).sqrt() * model_output
        if eta > 0:
            previous = previous + sigma * variance_noise
        return DDIMSchedulerOutput(previous, original) if return_dict else (previous, original)
