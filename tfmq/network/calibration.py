"""The calibration pool: what full-precision sampling feeds the network, from which every method draws its rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from diffusers import SchedulerMixin
from torch import Tensor
from tqdm.auto import tqdm

from tfmq.network.backbone import Network
from tfmq.network.sampling import Conditioning, SamplingSettings, Step, check_guidance, check_rows, sample
from tfmq.settings import check_counts, check_numbers


@dataclass(frozen=True)
class CalibrationRows:
    """Inputs of the network, drawn from a pool.

    Attributes:
        latents: float32 (N, C, H, W).
        timesteps: int64 (N,).
        context: (N, tokens, D), classes (N,), or None for an unconditional network.
    """

    latents: Tensor
    timesteps: Tensor
    context: Tensor | None = None

    def __post_init__(self) -> None:
        lengths = {name: len(value) for name, value in vars(self).items() if value is not None}
        if len(set(lengths.values())) > 1:
            found = ", ".join(f"{count} {name}" for name, count in lengths.items())
            raise ValueError(f"calibration rows of {found}: give as many of each")

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

    def batches(self, size: int) -> Iterator[CalibrationRows]:
        """The rows in their order, ``size`` at a time."""
        return (self[slice(start, start + size)] for start in range(0, len(self), size))

    def batches_of_steps(self, size: int) -> Iterator[CalibrationRows]:
        """At most ``size`` rows at a time, all of one time step: one step after another, each in the rows' order."""
        for timestep in self.timesteps.unique():
            yield from self[(self.timesteps == timestep).nonzero().flatten()].batches(size)


@dataclass(frozen=True)
class CalibrationSet:
    """The pool: inputs of every step of one full-precision sampling pass over some images.

    Attributes:
        latents: float32 (steps, images, C, H, W), noisiest step first.
        timesteps: int64 (steps,), those of the schedule; one that it repeats (PNDM) stands there as often.
        noise: float32 (steps, images, C, H, W), the full-precision prediction at each step, after guidance.
        samples: float32 (images, C, H, W), the final latents.
        alphas: float64 (steps + 1,), cumulative alpha at each step, then what it is after the last step.
        settings: of the sampling pass.
        context: (images, tokens, D), classes (images,), or None.
        unconditional: likewise, or None where there was no guidance; with it, drawn rows hold both halves.
    """

    latents: Tensor
    timesteps: Tensor
    noise: Tensor
    samples: Tensor
    alphas: Tensor
    settings: SamplingSettings
    context: Tensor | None = None
    unconditional: Tensor | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors by field name: with them, ``CalibrationSet(**tensors, settings=settings)`` is the same pool."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

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
        if self.unconditional is None:
            return CalibrationRows(latents, timesteps, context)
        context = torch.cat([context, self.unconditional[images]])
        return CalibrationRows(latents.repeat(2, 1, 1, 1), timesteps.repeat(2), context)


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
    check_guidance(conditioning, settings.guidance_scale)
    check_rows(network, noise, conditioning, settings.guidance_scale)
    steps: list[list[Step]] = []
    samples: list[Tensor] = []
    for start in tqdm(range(0, len(noise), batch), desc="calibration pool", disable=None):
        rows = slice(start, start + batch)
        part = None
        if conditioning is not None:
            unconditional = conditioning.unconditional
            part = Conditioning(conditioning.context[rows], None if unconditional is None else unconditional[rows])
        recorded: list[Step] = []
        final = sample(
            network,
            scheduler,
            noise[rows],
            settings,
            conditioning=part,
            step_noise=None if step_noise is None else step_noise[:, rows],
            callback=recorded.append,
        )
        steps.append(recorded)
        samples.append(final.cpu().float())
    timesteps = torch.tensor([step.timestep for step in steps[0]])
    return CalibrationSet(
        latents=torch.cat([torch.stack([step.latents for step in part]).cpu().float() for part in steps], 1),
        timesteps=timesteps,
        noise=torch.cat([torch.stack([step.noise for step in part]).cpu().float() for part in steps], 1),
        samples=torch.cat(samples),
        alphas=cumulative_alphas(scheduler, timesteps),
        settings=settings,
        context=None if conditioning is None else _on_cpu(conditioning.context),
        unconditional=(
            None if conditioning is None or settings.guidance_scale == 1.0 else _on_cpu(conditioning.unconditional)
        ),
    )


def cumulative_alphas(scheduler: SchedulerMixin, timesteps: Tensor) -> Tensor:
    """Cumulative alpha at each of ``timesteps`` (steps,) and after the last: float64 (steps + 1,).

    The last is the scheduler's own ``final_alpha_cumprod`` (DDIM, PNDM), or 1 for schedulers that end on clean data.
    Raises ValueError for a scheduler without cumulative alphas (flow matching).
    """
    cumulative = getattr(scheduler, "alphas_cumprod", None)
    if cumulative is None:
        raise ValueError(f"{type(scheduler).__name__} has no cumulative alphas: take a variance-preserving scheduler")
    final = torch.as_tensor(getattr(scheduler, "final_alpha_cumprod", 1.0)).reshape(1)
    return torch.cat([cumulative[timesteps].double().cpu(), final.double().cpu()])


def _on_cpu(tensor: Tensor | None) -> Tensor | None:
    # Text encoders leave a graph behind where the caller did not turn gradients off.
    if tensor is None:
        return None
    tensor = tensor.detach().cpu()
    return tensor.float() if tensor.is_floating_point() else tensor
