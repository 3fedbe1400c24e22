"""Calibration rows: inputs of a network, each with its time step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tfmq.network.conditioning import Inputs


@dataclass(frozen=True)
class CalibrationRows:
    """Inputs of the network, drawn from a pool.

    Attributes:
        latents: float32 (N, C, H, W).
        timesteps: (N,), int64, or float32 where the schedule has fractional steps.
        context: (N, tokens, D), classes (N,), or None for an unconditional network.
        inputs: further inputs by name (see `tfmq.network.conditioning`), each (N, ...).
    """

    latents: Tensor
    timesteps: Tensor
    context: Tensor | None = None
    inputs: Inputs = field(default_factory=dict)

    def __post_init__(self) -> None:
        lengths = {name: len(value) for name, value in self.tensors.items()}
        if len(set(lengths.values())) > 1:
            found = ", ".join(f"{count} {name}" for name, count in lengths.items())
            raise ValueError(f"calibration rows of {found}: give as many of each")

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, rows: Tensor | slice) -> CalibrationRows:
        context = None if self.context is None else self.context[rows]
        inputs = {name: value[rows] for name, value in self.inputs.items()}
        return CalibrationRows(self.latents[rows], self.timesteps[rows], context, inputs)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, those that there are."""
        given = {"latents": self.latents, "timesteps": self.timesteps, "context": self.context}
        return {name: value for name, value in given.items() if value is not None} | dict(self.inputs)

    def to(self, device: torch.device) -> CalibrationRows:
        """The rows with all but the time steps on ``device``; these stay where they are."""
        context = None if self.context is None else self.context.to(device)
        inputs = {name: value.to(device) for name, value in self.inputs.items()}
        return CalibrationRows(self.latents.to(device), self.timesteps, context, inputs)

    def shuffled(self, generator: torch.Generator) -> CalibrationRows:
        return self[torch.randperm(len(self), generator=generator)]

    def batches(self, size: int) -> Iterator[CalibrationRows]:
        """The rows in their order, ``size`` at a time."""
        return (self[slice(start, start + size)] for start in range(0, len(self), size))

    def batches_of_steps(self, size: int) -> Iterator[CalibrationRows]:
        """At most ``size`` rows at a time, all of one time step: one step after another, each in the rows' order."""
        for timestep in self.timesteps.unique():
            yield from self[(self.timesteps == timestep).nonzero().flatten()].batches(size)
