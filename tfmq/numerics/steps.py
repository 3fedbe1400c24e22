"""Time steps as schedules have them: whole numbers, or fractions (Euler, Heun, sigmas after Karras)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def exact_steps(steps: Tensor | Sequence[int | float] | int | float) -> Tensor:
    """Time steps of any shape as they are, on the CPU: int64 where all are whole, else float32 as in schedulers."""
    values = steps.detach().cpu() if isinstance(steps, Tensor) else torch.tensor(steps, device="cpu")
    whole = values.to(torch.int64)
    if not values.is_floating_point() or torch.equal(whole.to(values.dtype), values):
        return whole
    return values.to(torch.float32)


def step_value(step: Tensor | int | float) -> int | float:
    """One time step as a number: an int where it is whole, else a float."""
    return exact_steps(step).item()
