"""PTQD: correcting the noise that a quantised network predicts (He et al., NeurIPS 2023, arXiv 2305.10657).

The error of the prediction is read as a part that follows the prediction and a rest, eps_hat - eps = k eps + delta. At
each time step the sampler subtracts the mean of the error, divides 1 + k out, and lets the remaining deviation take the
place of some of the noise that the step would add. A corrected network carries the statistics of its schedule; sampling
costs no evaluation more.

The correction acts after guidance, so it is no part of the network's forward pass: `tfmq.sample` applies it, a
stock pipeline only with a scheduler of `corrected_scheduler`.
"""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from tfmq.cost import Shapes
from tfmq.modules.number_types import KeepsTypes
from tfmq.network.backbone import Network
from tfmq.network.calibration import CalibrationSet
from tfmq.network.sampling import CorrectedScheduler, predict_noise
from tfmq.numerics.steps import exact_steps, step_value
from tfmq.passes import Cost, Memory, Pass
from tfmq.settings import check_counts
from tfmq.state import check_finished

if TYPE_CHECKING:
    from tfmq.session import Session


def error_slope(noise: Tensor, error: Tensor) -> Tensor:
    """Slope of the least-squares line, with intercept, of ``error`` on ``noise`` over all their elements: a scalar."""
    noise, error = noise.double(), error.double()
    centred = noise - noise.mean()
    return (centred * error).sum() / centred.square().sum()


def error_bias(error: Tensor) -> Tensor:
    """Mean of the raw error (N, C, H, W) in each channel: (C,)."""
    return error.double().mean((0, 2, 3))


def residual_deviation(noise: Tensor, error: Tensor, slope: Tensor) -> Tensor:
    """Deviation of error - slope noise (N, C, H, W) within an image, averaged over the images: a scalar."""
    return (error.double() - slope * noise.double()).flatten(1).std(1).mean()


def corrected_noise(predicted: Tensor, slope: float, bias: Tensor) -> Tensor:
    """(eps_hat - bias) / (1 + slope) for a prediction (B, C, H, W) and biases (C,), in float32 at least."""
    bias = bias.to(predicted.device, torch.promote_types(predicted.dtype, torch.float32))
    return ((predicted - bias.view(-1, 1, 1)) / (1 + slope)).to(predicted.dtype)


def ddim_sigma(alpha: float, previous: float, eta: float) -> float:
    """DDIM's sigma (arXiv 2010.02502, eq. 16) for cumulative alphas before and after the step."""
    return eta * math.sqrt((1 - previous) / (1 - alpha) * (1 - alpha / previous))


def reduced_sigma(
    sigma: float, alpha: float, previous: float, deviation: float, predicts: tuple[float, float] = (0.0, 1.0)
) -> float:
    """The sigma that is left to add, where the prediction already carries noise of a ``deviation``.

    A predicted noise enters a DDIM step times lambda = sqrt(1 - a' - sigma^2) - sqrt(a' (1 - a) / a), so that
    sigma'^2 = max(sigma^2 - lambda^2 deviation^2, 0). A network that predicts p = k_x x_0 + k_e e, with
    k = ``predicts``, gives e = (sqrt(a) p - k_x x) / d and x_0 = (k_e x - sqrt(1 - a) p) / d, where
    d = k_e sqrt(a) - k_x sqrt(1 - a), so that lambda = (sqrt(a (1 - a' - sigma^2)) - sqrt(a' (1 - a))) / d.
    """
    if predicts == (0.0, 1.0):
        factor = math.sqrt(max(1 - previous - sigma**2, 0)) - math.sqrt(previous * (1 - alpha) / alpha)
    else:
        of_clean, of_noise = predicts
        shared = of_noise * math.sqrt(alpha) - of_clean * math.sqrt(1 - alpha)
        factor = math.sqrt(alpha * max(1 - previous - sigma**2, 0)) - math.sqrt(previous * (1 - alpha))
        factor /= shared
    return math.sqrt(max(sigma**2 - (factor * deviation) ** 2, 0))


class NoiseCorrection(KeepsTypes):
    """The corrections of all time steps, as a correction hook of `tfmq.network.sampling.sample`.

    It applies to the prediction after guidance. With eta = 0 there is no noise to reduce and only slope and bias act.
    A network carries it as ``noise_correction`` (see ``attach_correction``).

    Buffers, one entry for each of S time steps:
        timesteps: (S,), ascending, int64, or float32 where some are fractional.
        slopes: (S,), not negative.
        biases: (S, channels).
        deviations: (S,), of the prediction before it is divided by 1 + slope.
        alphas, previous_alphas: float64 (S,), cumulative alpha at the step and after it.
        predicts: float64 (S, 2), weights of clean sample and noise in what is predicted; None where that is the noise.
    """

    timesteps: Tensor
    slopes: Tensor
    biases: Tensor
    deviations: Tensor
    alphas: Tensor
    previous_alphas: Tensor
    predicts: Tensor | None

    def __init__(self, steps: int, channels: int, predicts_noise: bool = True) -> None:
        super().__init__()
        self.register_buffer("timesteps", torch.zeros(steps, dtype=torch.int64))
        self.register_buffer("slopes", torch.zeros(steps, dtype=torch.float32))
        self.register_buffer("biases", torch.zeros(steps, channels, dtype=torch.float32))
        self.register_buffer("deviations", torch.zeros(steps, dtype=torch.float32))
        self.register_buffer("alphas", torch.ones(steps, dtype=torch.float64))
        self.register_buffer("previous_alphas", torch.ones(steps, dtype=torch.float64))
        self.register_buffer("predicts", None if predicts_noise else torch.ones(steps, 2, dtype=torch.float64))

    @property
    def arguments(self) -> list[int | bool]:
        """What makes an empty one of its kind; that it predicts the noise goes without saying."""
        return [*self.biases.shape, *(() if self.predicts is None else (False,))]

    def check_schedule(self, timesteps: Tensor) -> None:
        """Raise ValueError if a schedule's time steps, each counted once, are not those of the statistics."""
        given = exact_steps(timesteps).unique()
        if not torch.equal(given, self.timesteps.cpu()):
            raise ValueError(
                f"the noise correction was measured for the {len(self.timesteps)} time steps "
                f"{self.timesteps.tolist()}, and the schedule has {given.tolist()}: sample with that schedule, or "
                "measure the correction on yours"
            )

    def forward(self, timestep: int | float, predicted: Tensor, eta: float) -> tuple[Tensor, float]:
        """Corrected noise, and the eta with which a DDIM step adds the reduced noise.

        Raises ValueError for a time step without statistics.
        """
        found = (self.timesteps == timestep).nonzero()
        if not len(found):
            raise ValueError(
                f"no noise correction for time step {timestep}: the statistics are those of {self.timesteps.tolist()}; "
                "sample with that schedule, or measure the correction on yours"
            )
        index = int(found[0])
        slope = self.slopes[index].item()
        corrected = corrected_noise(predicted, slope, self.biases[index])
        alpha, previous = self.alphas[index].item(), self.previous_alphas[index].item()
        sigma = ddim_sigma(alpha, previous, eta)
        if sigma == 0:
            return corrected, eta
        deviation = self.deviations[index].item() / (1 + slope)
        predicts = (0.0, 1.0)
        if self.predicts is not None:
            of_clean, of_noise = self.predicts[index].tolist()
            predicts = (of_clean, of_noise)
        return corrected, eta * reduced_sigma(sigma, alpha, previous, deviation, predicts) / sigma


@dataclass(frozen=True)
class MeasureCorrection(Pass):
    """Measure the quantised network's error on the pool's trajectory, and let the network carry the correction.

    Attributes:
        images: of the pool, at most as many as it holds; each is evaluated at every step.
        batch: images evaluated at once.
    """

    images: int = 1024
    batch: int = 32

    def __post_init__(self) -> None:
        check_counts(self, "images", "batch")

    def run(self, session: Session, rows: None) -> None:
        """See `Pass`. Raises ValueError where the passes before have not quantised the whole network."""
        check_finished(session.network, self.name)
        attach_correction(session.network, measure_correction(session.network, session.pool, self.images, self.batch))
        session.count_evaluations(trajectory_evaluations(session.pool, self.images))

    def cost(self, shapes: Shapes, rows: None) -> Cost:
        """See `Pass`."""
        return Cost(trajectory_evaluations(shapes.pool, self.images))

    def memory(self, shapes: Shapes, rows: None) -> Memory:
        """See `Pass`."""
        batch = shapes.pool.spaced(1, self.batch)
        return Memory(shapes.evaluated(batch, len(batch)))


def trajectory_evaluations(pool: CalibrationSet, images: int) -> int:
    """Sample evaluations that one pass over the pool's trajectory takes, two each under guidance."""
    halves = 1 if pool.unconditional is None else 2
    return halves * pool.steps * min(images, pool.images)


def attach_correction(network: Network, correction: NoiseCorrection) -> None:
    """Let ``network`` carry its correction, in its checkpoint too, and warn that stock pipelines do not apply it."""
    network.noise_correction = correction
    warnings.warn(
        "this network carries a noise correction, which acts after guidance: tfmq.sample applies it, a stock diffusers "
        "pipeline only with pipeline.scheduler = tfmq.corrected_scheduler(pipeline.scheduler, pipeline.unet)",
        stacklevel=3,
    )


@torch.no_grad()
def measure_correction(network: Network, pool: CalibrationSet, images: int, batch: int) -> NoiseCorrection:
    """Statistics of a quantised network's error on the full-precision trajectory of a pool.

    Takes steps x ``images`` evaluations (two each under guidance), at most as many images as the pool holds. The
    correction is of no effect until the network carries it (``attach_correction``).
    """
    images = min(images, pool.images)
    timesteps = pool.timesteps.unique()
    correction = NoiseCorrection(len(timesteps), pool.noise.shape[2], pool.predicts is None)
    correction.timesteps = timesteps
    for index, timestep in enumerate(timesteps):
        visits = (pool.timesteps == timestep).nonzero().flatten()
        predicted = torch.cat([quantized_noise(network, pool, visit, images, batch) for visit in visits.tolist()])
        noise = pool.noise[visits, :images].flatten(0, 1).to(predicted.device)
        error = predicted - noise
        slope = error_slope(noise, error).clamp_min(0)
        correction.slopes[index] = slope
        correction.biases[index] = error_bias(error)
        correction.deviations[index] = residual_deviation(noise, error, slope)
        correction.alphas[index] = pool.alphas[visits[-1]]
        correction.previous_alphas[index] = pool.alphas[visits[-1] + 1]
        if correction.predicts is not None and pool.predicts is not None:
            correction.predicts[index] = pool.predicts[visits[-1]]
    return correction.to(network.device)


@torch.no_grad()
def quantized_noise(network: Network, pool: CalibrationSet, step: int, images: int, batch: int) -> Tensor:
    """What ``network`` predicts, after guidance, at a step of the pool's trajectory: (images, C, H, W)."""
    parts = []
    for start in range(0, images, batch):
        rows = slice(start, min(start + batch, images))
        conditioning = pool.conditioning(step, rows, network.device)
        latents, scale = pool.latents[step, rows].to(network.device), pool.settings.guidance_scale
        parts.append(predict_noise(network, latents, pool.timesteps[step].to(network.device), conditioning, scale))
    return torch.cat(parts)


def correction_of(network: Network) -> NoiseCorrection | None:
    """The correction of the predicted noise that a network carries, or None."""
    return getattr(network, "noise_correction", None)


def corrected_scheduler(scheduler: SchedulerMixin, network: Network) -> CorrectedScheduler:
    """A copy of ``scheduler`` for stock pipelines, which applies the correction that ``network`` carries.

    A pipeline gives the noise to its scheduler after guidance, which is where the correction acts. Set it as
    ``pipeline.scheduler``; ``sample`` corrects by itself and takes the plain one.

    Raises ValueError if ``network`` carries no correction; the scheduler does for a schedule that is not its own.
    """
    carried = correction_of(network)
    if carried is None:
        raise ValueError("the network carries no noise correction: use the scheduler as it is")
    if isinstance(scheduler, CorrectedScheduler):
        raise ValueError("the scheduler corrects the noise already: give the plain one")
    correction: NoiseCorrection = carried
    plain: Any = type(scheduler)  # a class made here has bases that no type checker knows

    class Corrected(CorrectedScheduler, plain):
        @wraps(plain.set_timesteps)
        def set_timesteps(self, *args: object, **options: object) -> None:
            plain.set_timesteps(self, *args, **options)
            correction.check_schedule(self.timesteps)

        @wraps(plain.step)
        def step(self, model_output: Tensor, timestep: Tensor | int, sample: Tensor, **options: object) -> object:
            model_output, eta = correction(step_value(timestep), model_output, options.get("eta", 0.0))
            if "eta" in options:
                options["eta"] = eta
            return plain.step(self, model_output, timestep, sample, **options)

    corrected = copy.deepcopy(scheduler)
    corrected.__class__ = Corrected
    return corrected
