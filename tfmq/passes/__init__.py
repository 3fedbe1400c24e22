"""The passes: each does one thing to a network, in a file of its own, and a recipe is a tuple of them.

A new pass is one file, here or, if only one method does it, in that method's own: a frozen dataclass of its settings
that extends `Pass`.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

import torch

if TYPE_CHECKING:
    from tfmq.cost import Shapes
    from tfmq.network.backbone import Backbone, Network
    from tfmq.network.calibration import CalibrationSet
    from tfmq.network.rows import CalibrationRows
    from tfmq.plan import QuantizationPlan
    from tfmq.session import Session


@dataclass(frozen=True)
class Cost:
    """What a pass spends.

    Attributes:
        unet_evaluations: sample evaluations of the whole network.
        optimizer_steps: of learning.
        learned_rows: training samples, counted as full forward and backward passes; learning that depends on the time
            step alone is left out, since it costs next to nothing.
    """

    unet_evaluations: int = 0
    optimizer_steps: int = 0
    learned_rows: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass(frozen=True)
class Memory:
    """Bytes that a pass holds besides the networks.

    Attributes:
        held: in memory: calibration rows that wait between two blocks, and what the most demanding block needs while
            it is learned or evaluated.
        on_disk: of rows that wait on a disk, since they are more than the pass may hold in memory.
    """

    held: int = 0
    on_disk: int = 0

    @classmethod
    def of_blocks(cls, working: Sequence[int], waiting: Sequence[int], most_waiting: int) -> Memory:
        """The memory of a pass that works block by block, from what it takes and how much waits at each.

        What waits does so on a disk where it is more than ``most_waiting`` at any block.
        """
        if max(waiting) > most_waiting:
            return cls(max(working), max(waiting))
        return cls(max(map(sum, zip(working, waiting, strict=True))))


Rows = TypeVar("Rows", bound="CalibrationRows | None")


class Pass(ABC, Generic[Rows]):
    """One thing that is done to a network. Its fields are its settings.

    A pass that draws calibration rows extends ``Pass[CalibrationRows]``, any other ``Pass``; its rows are None.

    ``quantize_`` calls, each for all passes of the recipe in order: ``amend``, before the quantised layers are put in
    place; ``draw``, before the first pass runs, so that what a pass learns does not move what a later one draws; and
    ``run``. ``tfmq.cost`` calls ``cost`` and ``memory`` in the place of ``run``. Only ``run`` is required.

    A field with ``compare=False`` does not affect the result, and is left out of the address under which results are
    kept.

    Attributes:
        sees_activations: whether what it computes depends on how activations are quantised. Passes before the first
            that does give the same result at all widths of activations; ranges that are dynamic are always seen.
    """

    sees_activations: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """Its class in words, such as ``block reconstruction``."""
        return re.sub(r"(?<!^)(?=[A-Z])", " ", type(self).__name__).lower()

    def amend(self, plan: QuantizationPlan, network: Network, backbone: Backbone) -> QuantizationPlan:
        """The plan with what this pass changes of it; ``network`` is still in full precision."""
        return plan

    def draw(self, pool: CalibrationSet, generator: torch.Generator) -> Rows | None:
        """The calibration rows that ``run`` works on, or None. Pool and rows may be on the meta device."""
        return None

    @abstractmethod
    def run(self, session: Session, rows: Rows) -> None:
        """Work on ``session.network``, in place; ``rows`` are those that ``draw`` gave, on the network's device."""

    def cost(self, shapes: Shapes, rows: Rows) -> Cost:
        """What ``run`` spends, or the most it can where data decide; updates ``shapes`` as ``run`` the network."""
        return Cost()

    def memory(self, shapes: Shapes, rows: Rows) -> Memory | None:
        """An estimate of what ``run`` holds in memory; None where that is not known."""
        return Memory()


Recipe = tuple[Pass, ...]
