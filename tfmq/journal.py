"""Going on where a quantisation was stopped: what each unit of learning ends with is kept as soon as it is there.

A unit is what is learned together: the temporal information block, a layer of the time embedding, a block. What is
trained as a whole (TDQ) is none, and begins again. A journal changes nothing of what comes out, so it is no argument of
a recipe: it stands around it, as ``torch.no_grad`` does.

    with journaled(journal):
        method.quantize(...)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

GENERATOR, SECONDS, STEPS = "generator", "seconds", "optimizer_steps"


class Journal(Protocol):
    """Where units are kept, for one quantisation: other settings, inputs or code need another journal."""

    def get(self, key: str) -> dict[str, Tensor] | None:
        """What was put under ``key``, or None."""

    def put(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Keep ``tensors`` (on the CPU); a put that is cut short must leave nothing under ``key``."""


_current: ContextVar[Journal | None] = ContextVar("journal", default=None)


@contextmanager
def journaled(journal: Journal) -> Iterator[None]:
    """Put into ``journal`` what is learned inside, and take from it what it has already."""
    token = _current.set(journal)
    try:
        yield
    finally:
        _current.reset(token)


@dataclass
class Effort:
    """What a quantisation has spent: sample evaluations of the whole UNet, and optimiser steps.

    ``journaled_seconds`` are those of learning that was taken from a journal; the steps count as ever.
    """

    unet_evaluations: int = 0
    optimizer_steps: int = 0
    journaled_seconds: float = field(default=0.0, compare=False)


def learn_unit(
    name: str,
    learn: Callable[[], list[float]],
    learned: Callable[[], dict[str, Tensor]],
    restore: Callable[[dict[str, Tensor]], None],
    generator: torch.Generator,
    effort: Effort,
) -> None:
    """Learn a unit, or take it from the journal: then the generator goes on as after learning it.

    Args:
        name: of the unit; with the optimiser steps before it, it is the journal's key.
        learn: does it, one loss for each optimiser step.
        learned: what it ends with, by names that are none of this module's.
        restore: takes that instead of learning.
    """
    journal = _current.get()
    key = f"{effort.optimizer_steps:09d}-{name}"
    kept = None if journal is None else journal.get(key)
    if kept is not None:
        kept = dict(kept)
        generator.set_state(kept.pop(GENERATOR))
        effort.journaled_seconds += kept.pop(SECONDS).item()
        effort.optimizer_steps += int(kept.pop(STEPS))
        restore(kept)
        return
    start = time.perf_counter()
    steps = len(learn())
    effort.optimizer_steps += steps
    if journal is not None:
        tensors = {part: tensor.detach().cpu() for part, tensor in learned().items()}
        seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
        journal.put(key, tensors | {GENERATOR: generator.get_state(), SECONDS: seconds, STEPS: torch.tensor(steps)})
