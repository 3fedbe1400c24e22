"""The one denoising loop: every method, the calibration pool and the full-precision reference run through it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from tfmq.network.backbone import Network, check_inputs, evaluate
from tfmq.settings import check_counts, check_numbers


@dataclass(frozen=True)
class SamplingSettings:
    """How a network is sampled.

    Attributes:
        steps: of the schedule.
        eta: DDIM's, 0 for deterministic and 1 for ancestral sampling.
        guidance_scale: of classifier-free guidance; 1 for none.
    """

    steps: int
    eta: float = 0.0
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        check_counts(self, "steps")
        check_numbers(self, "eta", least=0)
        check_numbers(self, "guidance_scale")


@dataclass(frozen=True)
class Conditioning:
    """What each image is conditioned on.

    Attributes:
        context: (B, tokens, D) for cross-attention, or int64 classes (B,).
        unconditional: its counterpart for guidance, of the same shape; None without guidance.
    """

    context: Tensor
    unconditional: Tensor | None = None


@dataclass(frozen=True)
class Step:
    """What a callback sees of one denoising step.

    Attributes:
        index: position in the schedule, 0 the noisiest.
        timestep: the schedule's time step.
        latents: input of the network (B, C, H, W), before guidance doubles it.
        noise: predicted noise (B, C, H, W), after guidance and correction.
    """

    index: int
    timestep: int
    latents: Tensor
    noise: Tensor


Callback = Callable[[Step], None]
Correction = Callable[[int, Tensor, float], tuple[Tensor, float]]


class CarriedCorrection(Protocol):
    """A correction that a network carries as ``noise_correction``; it holds for the schedule it was measured on."""

    def __call__(self, timestep: int, noise: Tensor, eta: float) -> tuple[Tensor, float]:
        """The noise and the eta of the scheduler step."""

    def check_schedule(self, timesteps: Tensor) -> None:
        """Raise ValueError for other time steps than those that it was measured at."""


def predict_noise(
    network: Network, latents: Tensor, timestep: Tensor, conditioning: Conditioning | None, guidance_scale: float
) -> Tensor:
    """Predicted noise at ``timestep``; under guidance e = e_u + s (e_c - e_u), halves ordered [uncond, cond].

    A correction that ``network`` carries is not in it. Raises ValueError for a guidance scale other than 1 without both
    halves of the conditioning.
    """
    check_guidance(conditioning, guidance_scale)
    if conditioning is None or conditioning.unconditional is None or guidance_scale == 1.0:
        return evaluate(network, latents, timestep, None if conditioning is None else conditioning.context)
    context = torch.cat([conditioning.unconditional, conditioning.context])
    unconditional, conditional = evaluate(network, torch.cat([latents, latents]), timestep, context).chunk(2)
    return unconditional + guidance_scale * (conditional - unconditional)


def check_guidance(conditioning: Conditioning | None, guidance_scale: float) -> None:
    """Raise ValueError for a guidance scale other than 1 where there is nothing to guide with."""
    if guidance_scale == 1.0 or (conditioning is not None and conditioning.unconditional is not None):
        return
    lacks = "conditioning" if conditioning is None else "unconditional half of the conditioning"
    raise ValueError(
        f"guidance_scale is {guidance_scale}, but there is no {lacks}: give a Conditioning with context and "
        "unconditional, or take the guidance scale 1"
    )


def check_rows(network: Network, noise: Tensor, conditioning: Conditioning | None, guidance_scale: float) -> None:
    """Raise ValueError for noise, or a half of the conditioning beside it, that ``network`` cannot take."""
    check_inputs(network, noise, None if conditioning is None else conditioning.context)
    if conditioning is None or conditioning.unconditional is None or guidance_scale == 1.0:
        return
    context, unconditional = (tuple(half.shape) for half in (conditioning.context, conditioning.unconditional))
    if context != unconditional:
        raise ValueError(
            f"a context of shape {context} and an unconditional one of {unconditional}: give both halves of one shape"
        )


class CorrectedScheduler(SchedulerMixin):
    """A scheduler that corrects the predicted noise itself; ``tfmq.corrected_scheduler`` makes one."""


@torch.no_grad()
def sample(
    network: Network,
    scheduler: SchedulerMixin,
    noise: Tensor,
    settings: SamplingSettings,
    *,
    conditioning: Conditioning | None = None,
    step_noise: Tensor | None = None,
    callback: Callback | None = None,
    correction: Correction | None = None,
) -> Tensor:
    """Denoise ``noise`` (B, C, H, W) to latents, exactly as the stock diffusers pipelines do.

    Noise, step noise and context are cast to the type of the network, such as float16, which is that of the latents.

    Args:
        step_noise: (steps, B, C, H, W), the noise that eta > 0 adds at each step.
        correction: maps (time step, noise after guidance, eta) to the noise and the eta of that scheduler step.
            DDIM's sigma is proportional to eta, also in its direction term, so eta sigma'/sigma reduces it to sigma'.
            None takes the one that ``network`` carries, if any.

    Raises:
        ValueError: the network predicted NaN or infinity, with the step and the first layer; eta is above 0 and the
            scheduler takes none; there is guidance without both halves of the conditioning; the network does not take
            the shape of the noise, or of a half of the conditioning beside it; or the correction that ``network``
            carries was measured on another schedule, or is applied by the scheduler already.
    """
    check_guidance(conditioning, settings.guidance_scale)
    check_rows(network, noise, conditioning, settings.guidance_scale)
    if isinstance(scheduler, CorrectedScheduler):
        raise ValueError("the scheduler corrects the noise already, and sample does: give the plain scheduler")
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(settings.steps, device=noise.device)
    carried: CarriedCorrection | None = getattr(network, "noise_correction", None)
    correction = carried if correction is None else correction
    if carried is not None and correction is carried:
        carried.check_schedule(scheduler.timesteps)
    accepts_eta = "eta" in inspect.signature(scheduler.step).parameters
    if settings.eta > 0 and not accepts_eta:
        raise ValueError(f"{type(scheduler).__name__} takes no eta, and eta is {settings.eta}: set it to 0")
    latents = noise.to(network.dtype) * scheduler.init_noise_sigma
    for index, timestep in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(latents, timestep)
        predicted = predict_noise(network, scaled, timestep, conditioning, settings.guidance_scale)
        if not torch.isfinite(predicted).all():
            layer = _first_nonfinite_layer(network, scaled, timestep, conditioning)
            raise ValueError(f"sampling: {layer} put out NaN or infinity at step {index} (time step {int(timestep)})")
        eta = settings.eta
        if correction is not None:
            predicted, eta = correction(int(timestep), predicted, eta)
        if callback is not None:
            callback(Step(index, int(timestep), scaled, predicted))
        extra: dict[str, float | Tensor] = {}
        if accepts_eta:
            extra["eta"] = eta
            if settings.eta > 0:
                if step_noise is None:
                    raise ValueError("eta > 0 needs step_noise, the noise that each step adds")
                extra["variance_noise"] = step_noise[index].to(latents.dtype)
        latents = scheduler.step(predicted, timestep, latents, **extra).prev_sample
    return latents


def _first_nonfinite_layer(
    network: Network, latents: Tensor, timestep: Tensor, conditioning: Conditioning | None
) -> str:
    found: list[str] = []

    def watch(path: str) -> Callable:
        def hook(module: torch.nn.Module, args: tuple, output: object) -> None:
            if isinstance(output, Tensor) and not torch.isfinite(output).all():
                found.append(path)

        return hook

    hooks = [m.register_forward_hook(watch(p)) for p, m in network.named_modules() if not any(m.children())]
    try:
        predict_noise(network, latents, timestep, conditioning, 1.0)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else "the network"
