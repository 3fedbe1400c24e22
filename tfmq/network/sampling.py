"""The one denoising loop: every method, the calibration pool and the full-precision reference run through it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from tfmq.network.backbone import Network, check_inputs, evaluate
from tfmq.network.conditioning import Conditioning, Inputs
from tfmq.network.schedulers import adds_noise, check_scheduler, is_ddim
from tfmq.numerics.draws import GivenNoise
from tfmq.numerics.finite import all_finite
from tfmq.numerics.steps import step_value
from tfmq.settings import check_counts, check_numbers


@dataclass(frozen=True)
class SamplingSettings:
    """How a network is sampled.

    Attributes:
        steps: of the schedule.
        eta: DDIM's, 0 for deterministic and 1 for ancestral sampling.
        guidance_scale: of classifier-free guidance, which sets in above 1, as in stock pipelines.
    """

    steps: int
    eta: float = 0.0
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        check_counts(self, "steps")
        check_numbers(self, "eta", least=0)
        check_numbers(self, "guidance_scale")


@dataclass(frozen=True)
class Step:
    """What a callback sees of one denoising step.

    Attributes:
        index: position in the schedule, 0 the noisiest.
        timestep: the schedule's time step, a float where it is fractional.
        latents: input of the network (B, C, H, W), before guidance doubles it and channels are concatenated to it.
        noise: predicted noise (B, C, H, W), after guidance and correction.
        residuals: what ControlNets add, by name, (B, ...), or (2 B, ...) under guidance, [unconditional, conditional].
    """

    index: int
    timestep: int | float
    latents: Tensor
    noise: Tensor
    residuals: Inputs = field(default_factory=dict)


Callback = Callable[[Step], None]
Correction = Callable[[int | float, Tensor, float], tuple[Tensor, float]]


class CarriedCorrection(Protocol):
    """A correction that a network carries as ``noise_correction``; it holds for the schedule it was measured on."""

    def __call__(self, timestep: int | float, noise: Tensor, eta: float) -> tuple[Tensor, float]:
        """The noise and the eta of the scheduler step."""

    def check_schedule(self, timesteps: Tensor) -> None:
        """Raise ValueError for other time steps than those that it was measured at."""


def predict_noise(
    network: Network, latents: Tensor, timestep: Tensor, conditioning: Conditioning | None, guidance_scale: float
) -> Tensor:
    """Predicted noise at ``timestep``; under guidance e = e_u + s (e_c - e_u), halves ordered [uncond, cond].

    A correction that ``network`` carries is not in it. Raises ValueError for guidance without both halves of the
    conditioning.
    """
    return _predict(network, latents, timestep, conditioning, guidance_scale)[0]


def _predict(
    network: Network, latents: Tensor, timestep: Tensor, conditioning: Conditioning | None, guidance_scale: float
) -> tuple[Tensor, Inputs]:
    """Predicted noise, and what ControlNets add."""
    check_guidance(network, conditioning, guidance_scale)
    if conditioning is None:
        return evaluate(network, latents, timestep), {}
    if not guides(network, guidance_scale):
        residuals = conditioning.residuals(latents, timestep, conditioning.context, conditioning.inputs)
        inputs = {**conditioning.inputs, **residuals}
        return evaluate(network, latents, timestep, conditioning.context, inputs), residuals
    context, fixed = conditioning.both_halves()
    doubled = torch.cat([latents, latents])
    residuals = conditioning.residuals(doubled, timestep, context, fixed)
    predicted = evaluate(network, doubled, timestep, context, {**fixed, **residuals})
    unconditional, conditional = predicted.chunk(2)
    return unconditional + guidance_scale * (conditional - unconditional), residuals


def guides(network: Network, guidance_scale: float) -> bool:
    """Whether stock pipelines guide: above 1 alone, and not a network that is given the guidance scale itself (LCM).

    `LDMTextToImagePipeline` is the exception, which guides below 1 too.
    """
    return guidance_scale > 1 and getattr(network, "config", {}).get("time_cond_proj_dim") is None


def check_guidance(network: Network, conditioning: Conditioning | None, guidance_scale: float) -> None:
    """Raise ValueError for guidance where there is nothing to guide with."""
    if not guides(network, guidance_scale) or (conditioning is not None and conditioning.unconditional is not None):
        return
    lacks = "conditioning" if conditioning is None else "unconditional half of the conditioning"
    raise ValueError(
        f"guidance_scale is {guidance_scale}, but there is no {lacks}: give a Conditioning with context and "
        "unconditional, or take the guidance scale 1"
    )


def check_rows(network: Network, noise: Tensor, conditioning: Conditioning | None, guidance_scale: float) -> None:
    """Raise ValueError for noise, or a half of the conditioning beside it, that ``network`` cannot take."""
    if conditioning is None:
        check_inputs(network, noise, None)
        return
    check_inputs(network, noise, conditioning.context, conditioning.inputs)
    if conditioning.unconditional is None or not guides(network, guidance_scale):
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
    """Denoise ``noise`` (B, C, H, W) to latents, as the stock diffusers pipelines do.

    The schedulers of `tfmq.network.schedulers.EXACT` give what those pipelines give with the same noise; others are
    refused before anything is computed. A `StableDiffusionXLPipeline` and the like with ``guidance_rescale`` or
    ``denoising_end``, and pipelines that guide in another way (InstructPix2Pix, PAG), are not meant.

    Noise, step noise and context are cast to the type of the network, such as float16, which is that of the latents.

    Args:
        step_noise: (evaluations, B, C, H, W), the noise that each step adds, where steps add any: with eta > 0, with
            ancestral samplers, DDPM, LCM and others. A schedule may have more evaluations than steps (Heun). A step
            that adds none, such as the last one, ignores its own.
        correction: maps (time step, noise after guidance, eta) to the noise and the eta of that scheduler step.
            DDIM's sigma is proportional to eta, also in its direction term, so eta sigma'/sigma reduces it to sigma'.
            None takes the one that ``network`` carries, if any.

    Raises:
        ValueError: the network predicted NaN or infinity, with the step and the first layer; the scheduler is none that
            can be sampled exactly; it adds noise and there is no ``step_noise`` of the right shape; eta is above 0 and
            the scheduler takes none; there is guidance without both halves of the conditioning; the network does not
            take the shape of the noise, or of a half of the conditioning beside it; or the correction that ``network``
            carries was measured on another schedule, or is applied by the scheduler already.
    """
    if isinstance(scheduler, CorrectedScheduler):
        raise ValueError("the scheduler corrects the noise already, and sample does: give the plain scheduler")
    check_scheduler(scheduler)
    check_guidance(network, conditioning, settings.guidance_scale)
    check_rows(network, noise, conditioning, settings.guidance_scale)
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(settings.steps, device=noise.device)
    carried: CarriedCorrection | None = getattr(network, "noise_correction", None)
    correction = carried if correction is None else correction
    if carried is not None and correction is carried:
        carried.check_schedule(scheduler.timesteps)
    takes = inspect.signature(scheduler.step).parameters
    if settings.eta > 0 and "eta" not in takes:
        raise ValueError(f"{type(scheduler).__name__} takes no eta, and eta is {settings.eta}: set it to 0")
    if correction is not None and settings.eta > 0 and not is_ddim(scheduler):
        raise ValueError(
            f"a noise correction reduces the eta of DDIM, and {type(scheduler).__name__} means another: set eta to 0"
        )
    noisy = adds_noise(scheduler, settings.eta)
    if noisy:
        _check_step_noise(scheduler, settings, step_noise, noise)
    latents = noise.to(network.dtype) * scheduler.init_noise_sigma
    for index, timestep in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(latents, timestep)
        predicted, residuals = _predict(network, scaled, timestep, conditioning, settings.guidance_scale)
        if not all_finite(predicted):
            layer = _first_nonfinite_layer(network, scaled, timestep, conditioning)
            at = step_value(timestep)
            raise ValueError(f"sampling: {layer} put out NaN or infinity at step {index} (time step {at})")
        eta = settings.eta
        if correction is not None:
            predicted, eta = correction(step_value(timestep), predicted, eta)
        if callback is not None:
            callback(Step(index, step_value(timestep), scaled, predicted, residuals))
        extra: dict[str, float | Tensor] = {"eta": eta} if "eta" in takes else {}
        given = None if step_noise is None or not noisy else step_noise[index].to(latents.dtype)
        if given is not None and "eta" in takes and "variance_noise" in takes:
            extra["variance_noise"] = given
            given = None
        with nullcontext() if given is None else GivenNoise(given):
            latents = scheduler.step(predicted, timestep, latents, **extra).prev_sample
    return latents


def _check_step_noise(
    scheduler: SchedulerMixin, settings: SamplingSettings, step_noise: Tensor | None, noise: Tensor
) -> None:
    """Raise ValueError for steps that add noise, of which there is none or of another shape."""
    why = f"{type(scheduler).__name__} adds noise and" if settings.eta == 0 else "eta > 0"
    wanted = (len(scheduler.timesteps), *noise.shape)
    if step_noise is None:
        raise ValueError(f"{why} needs step_noise, the noise that each step adds, of shape {wanted}")
    if tuple(step_noise.shape) != wanted:
        raise ValueError(f"{why} needs step_noise of shape {wanted}, and it is of shape {tuple(step_noise.shape)}")


def _first_nonfinite_layer(
    network: Network, latents: Tensor, timestep: Tensor, conditioning: Conditioning | None
) -> str:
    found: list[str] = []

    def watch(path: str) -> Callable:
        def hook(module: torch.nn.Module, args: tuple, output: object) -> None:
            if isinstance(output, Tensor) and not all_finite(output):
                found.append(path)

        return hook

    hooks = [m.register_forward_hook(watch(p)) for p, m in network.named_modules() if not any(m.children())]
    try:
        predict_noise(network, latents, timestep, conditioning, 1.0)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else "the network"
