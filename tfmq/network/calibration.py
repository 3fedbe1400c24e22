"""The calibration pool: what full-precision sampling feeds the network, from which every method draws its rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import Tensor
from tqdm.auto import tqdm

from tfmq.network.backbone import Network
from tfmq.network.conditioning import Conditioning, Inputs
from tfmq.network.rows import CalibrationRows
from tfmq.network.sampling import SamplingSettings, Step, check_guidance, check_rows, guides, sample
from tfmq.network.schedulers import check_scheduler, cumulative_alphas, prediction_of, prediction_weights
from tfmq.numerics.steps import exact_steps
from tfmq.settings import check_counts, check_numbers


@dataclass(frozen=True)
class CalibrationSet:
    """The pool: inputs of every step of one full-precision sampling pass over some images.

    Attributes:
        latents: float32 (steps, images, C, H, W), noisiest step first.
        timesteps: (steps,), those of the schedule, int64, or float32 where it has fractional ones; one that it repeats
            (PNDM, Heun) stands there as often.
        noise: float32 (steps, images, C, H, W), the full-precision prediction at each step, after guidance.
        samples: float32 (images, C, H, W), the final latents.
        alphas: float64 (steps + 1,), cumulative alpha at each step, then what it is after the last step.
        settings: of the sampling pass.
        context: (images, tokens, D), classes (images,), or None.
        unconditional: likewise, or None where there was no guidance; with it, drawn rows hold both halves.
        predicts: float64 (steps, 2), weights of the clean sample and of the noise in what the network predicts at each
            step; None where it predicts the noise itself.
        inputs, unconditional_inputs: further inputs by name, as in ``Conditioning``, each (images, ...).
        residuals, unconditional_residuals: those of ControlNets, each (steps, images, ...).
        scheduler: of the sampling pass; None where it is not known, as in a pool that was read from a file.
    """

    latents: Tensor
    timesteps: Tensor
    noise: Tensor
    samples: Tensor
    alphas: Tensor
    settings: SamplingSettings
    context: Tensor | None = None
    unconditional: Tensor | None = None
    predicts: Tensor | None = None
    inputs: Inputs = field(default_factory=dict)
    unconditional_inputs: Inputs = field(default_factory=dict)
    residuals: Inputs = field(default_factory=dict)
    unconditional_residuals: Inputs = field(default_factory=dict)
    scheduler: SchedulerMixin | None = field(default=None, compare=False, repr=False)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors by field name, those by name as ``field/name``: ``CalibrationSet.of`` makes a pool of them."""
        found = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        for group in NAMED:
            found |= {f"{group}/{name}": value for name, value in getattr(self, group).items()}
        return found

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], settings: SamplingSettings) -> CalibrationSet:
        """The pool that has these ``tensors`` and was recorded with these settings."""
        fields: dict[str, Any] = {group: {} for group in NAMED}
        for key, value in tensors.items():
            group, _, name = key.partition("/")
            (fields[group] if name else fields)[name or key] = value
        return cls(**fields, settings=settings)

    @property
    def steps(self) -> int:
        return self.latents.shape[0]

    @property
    def images(self) -> int:
        return self.latents.shape[1]

    def spaced(self, steps: int, images: int, among: Tensor | None = None) -> CalibrationRows:
        """The first ``images`` images at ``steps`` uniformly spaced time steps from the noisiest, ordered by step.

        Q-Diffusion's draw (arXiv 2302.04304, section 4.1). More than the pool holds is cut to what it holds. A time
        step that the schedule repeats (PNDM) counts once and gives the rows of each visit. ``among`` restricts the draw
        to these time steps.
        """
        finite_set = self.timesteps.unique().flip(0)
        if among is not None:
            finite_set = finite_set[torch.isin(finite_set, among)]
        steps, images = min(steps, len(finite_set)), min(images, self.images)
        chosen = finite_set[torch.arange(steps) * len(finite_set) // steps]
        visits = torch.isin(self.timesteps, chosen).nonzero().flatten()
        return self.rows(visits.repeat_interleave(images), torch.arange(images).repeat(len(visits)))

    def normal(self, count: int, mean: float, deviation: float, generator: torch.Generator) -> CalibrationRows:
        """``count`` rows whose steps are normally distributed, each of the next image: PTQ4DM's draw (NDTC).

        ``mean`` and ``deviation`` are shares of the schedule, counted from its clean end (see ``normal_steps``).
        """
        counted = normal_steps(count, mean, deviation, self.steps, generator)
        return self.rows(self.steps - 1 - counted, torch.arange(count) % self.images)

    def rows(self, steps: Tensor, images: Tensor) -> CalibrationRows:
        """Inputs at positions ``steps`` (N,) of the schedule for ``images`` (N,); under guidance both halves."""
        latents, timesteps = self.latents[steps, images], self.timesteps[steps]
        if self.context is None:
            return CalibrationRows(latents, timesteps)
        context = self.context[images]
        inputs = {name: value[images] for name, value in self.inputs.items()}
        inputs |= {name: value[steps, images] for name, value in self.residuals.items()}
        if self.unconditional is None:
            return CalibrationRows(latents, timesteps, context, inputs)
        off = inputs | {name: value[images] for name, value in self.unconditional_inputs.items()}
        off |= {name: value[steps, images] for name, value in self.unconditional_residuals.items()}
        context = torch.cat([context, self.unconditional[images]])
        inputs = {name: torch.cat([value, off[name]]) for name, value in inputs.items()}
        return CalibrationRows(latents.repeat(2, 1, 1, 1), timesteps.repeat(2), context, inputs)

    def conditioning(self, step: int, images: slice, device: torch.device) -> Conditioning | None:
        """What some images are conditioned on at a position of the schedule, with the recorded residuals."""
        if self.context is None:
            return None
        off = None if self.unconditional is None else self.unconditional[images].to(device)

        def joined(inputs: Inputs, residuals: Inputs) -> Inputs:
            fixed = {name: value[images].to(device) for name, value in inputs.items()}
            return fixed | {name: value[step, images].to(device) for name, value in residuals.items()}

        return Conditioning(
            self.context[images].to(device),
            off,
            joined(self.inputs, self.residuals),
            joined(self.unconditional_inputs, self.unconditional_residuals),
        )


NAMED = ("inputs", "unconditional_inputs", "residuals", "unconditional_residuals")
Draw = Callable[[CalibrationSet, torch.Generator], CalibrationRows]


@dataclass(frozen=True)
class Spaced:
    """A draw of rows at uniformly spaced time steps: ``CalibrationSet.spaced``.

    Attributes:
        steps: how many time steps; None takes every one of the schedule.
        images: how many images at each.
        shuffled: in random order, instead of step by step.
    """

    steps: int | None
    images: int
    shuffled: bool = False

    def __post_init__(self) -> None:
        check_counts(self, "images", *(() if self.steps is None else ("steps",)))

    def __call__(
        self, pool: CalibrationSet, generator: torch.Generator, among: Tensor | None = None
    ) -> CalibrationRows:
        """The rows; ``among`` restricts the draw to these time steps."""
        rows = pool.spaced(pool.steps if self.steps is None else self.steps, self.images, among)
        return rows.shuffled(generator) if self.shuffled else rows


@dataclass(frozen=True)
class NormallyDistributed:
    """PTQ4DM's draw of rows at normally distributed time steps: ``CalibrationSet.normal``.

    Attributes:
        rows: how many; under guidance, of each half.
        mean: of the drawn steps, as a share of the schedule from its clean end.
        deviation: likewise; None for sqrt(T / 2) steps of a schedule of T.
        shuffled: in random order, instead of that of the draw.
    """

    rows: int
    mean: float
    deviation: float | None = None
    shuffled: bool = False

    def __post_init__(self) -> None:
        check_counts(self, "rows")
        check_numbers(self, "mean", *(() if self.deviation is None else ("deviation",)))

    def __call__(self, pool: CalibrationSet, generator: torch.Generator) -> CalibrationRows:
        rows = self.rows_of(pool, generator)
        return rows.shuffled(generator) if self.shuffled else rows

    def rows_of(self, pool: CalibrationSet, generator: torch.Generator) -> CalibrationRows:
        """The rows as they are drawn, before they are shuffled."""
        return pool.normal(self.rows, self.mean, self.deviation_in(pool), generator)

    def deviation_in(self, pool: CalibrationSet) -> float:
        """The deviation as a share of the schedule of ``pool``."""
        return math.sqrt(pool.steps / 2) / pool.steps if self.deviation is None else self.deviation


def normal_steps(count: int, mean: float, deviation: float, steps: int, generator: torch.Generator) -> Tensor:
    """Steps of a schedule drawn from N(mean, deviation^2), in shares of its length: int64 (count,), 0 the cleanest.

    PTQ4DM (arXiv 2211.15736), with its released code's rule for numbers (``cut_to_steps``).
    """
    numbers = torch.randn(count, generator=generator, dtype=torch.float64)
    return cut_to_steps((mean + deviation * numbers) * steps, steps)


def cut_to_steps(numbers: Tensor, steps: int) -> Tensor:
    """Numbers cut towards zero and clipped to 0 .. steps - 1."""
    return numbers.to(torch.int64).clamp(0, steps - 1)


def collect_calibration(
    network: Network,
    scheduler: SchedulerMixin,
    noise: Tensor,
    settings: SamplingSettings,
    *,
    batch: int,
    conditioning: Conditioning | None = None,
    step_noise: Tensor | None = None,
) -> CalibrationSet:
    """Record the pool in one sampling pass over ``noise`` (N, C, H, W): T evaluations an image for T steps.

    The pool is float32, whatever the type of the network: what a network in half precision takes and puts out, exactly.

    Raises ValueError for no noise, a batch below 1, and what ``sample`` refuses.
    """
    if not len(noise):
        raise ValueError(f"noise of shape {tuple(noise.shape)} holds no image: give at least one")
    if batch < 1:
        raise ValueError(f"batch is {batch}: it must be at least 1")
    check_scheduler(scheduler)
    check_guidance(network, conditioning, settings.guidance_scale)
    check_rows(network, noise, conditioning, settings.guidance_scale)
    steps: list[list[Step]] = []
    samples: list[Tensor] = []
    for start in tqdm(range(0, len(noise), batch), desc="calibration pool", disable=None):
        rows = slice(start, start + batch)
        recorded: list[Step] = []
        final = sample(
            network,
            scheduler,
            noise[rows],
            settings,
            conditioning=None if conditioning is None else conditioning[rows],
            step_noise=None if step_noise is None else step_noise[:, rows],
            callback=recorded.append,
        )
        steps.append(recorded)
        samples.append(final.cpu().float())
    timesteps = exact_steps([step.timestep for step in steps[0]])
    alphas = cumulative_alphas(scheduler, timesteps, settings.steps)
    guided = conditioning is not None and guides(network, settings.guidance_scale)
    unconditional = None if conditioning is None else conditioning.unconditional
    residuals = _residuals(steps)
    off = {name: value[:, 0] for name, value in residuals.items()} if guided else {}
    return CalibrationSet(
        latents=torch.cat([torch.stack([step.latents for step in part]).cpu().float() for part in steps], 1),
        timesteps=timesteps,
        noise=torch.cat([torch.stack([step.noise for step in part]).cpu().float() for part in steps], 1),
        samples=torch.cat(samples),
        alphas=alphas,
        settings=settings,
        context=None if conditioning is None else on_cpu(conditioning.context),
        unconditional=on_cpu(unconditional) if guided and unconditional is not None else None,
        predicts=prediction_weights(prediction_of(scheduler), alphas[:-1]),
        inputs={} if conditioning is None else _all_on_cpu(conditioning.inputs),
        unconditional_inputs=_all_on_cpu(conditioning.unconditional_inputs) if guided and conditioning else {},
        residuals={name: value[:, -1] for name, value in residuals.items()},
        unconditional_residuals=off,
        scheduler=scheduler,
    )


def on_cpu(tensor: Tensor) -> Tensor:
    """A tensor as pools hold it: on the CPU, in float32 if it floats."""
    # Text encoders leave a graph behind where the caller did not turn gradients off.
    tensor = tensor.detach().cpu()
    return tensor.float() if tensor.is_floating_point() else tensor


def _residuals(batches: Sequence[Sequence[Step]]) -> dict[str, Tensor]:
    """The residuals of all steps and images by name: (steps, halves, images, ...), halves as guidance orders them."""
    parts: dict[str, list[Tensor]] = {}
    for steps in batches:
        for name in steps[0].residuals:
            stacked = torch.stack([on_cpu(step.residuals[name]) for step in steps])
            parts.setdefault(name, []).append(stacked.unflatten(1, (-1, len(steps[0].latents))))
    return {name: torch.cat(values, 2) for name, values in parts.items()}


def _all_on_cpu(inputs: Inputs) -> dict[str, Tensor]:
    return {name: on_cpu(value) for name, value in inputs.items()}
