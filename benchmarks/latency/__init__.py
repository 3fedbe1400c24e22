"""What executes a network, and how fast: one engine for each way, timed in alternating processes.

An engine makes files of a network once (`Engine.make`), and loads them where it is timed (`Engine.load`).
`benchmarks.stages.latency` measures all of them on a task or on a network of full size with random weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from tfmq.network.backbone import Network
from tfmq.network.rows import CalibrationRows

# The predicted noise (B, C, H, W) for latents, a time step of all rows, and a context, classes or None.
Evaluate = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Workload:
    """What is evaluated.

    Attributes:
        full: the full-precision network.
        quantized: by precision, such as ``w8a8``; on grids that integer kernels execute.
        rows: calibration rows, at least one evaluation's.
        batch: rows of one evaluation.
        timesteps: that the network is sampled at.
    """

    full: Network
    quantized: dict[str, Network]
    rows: CalibrationRows
    batch: int
    timesteps: list[int]


class Engine(ABC):
    """One way to execute a network at one precision. Its settings decide its name.

    Attributes:
        precision: ``w32a32`` for full precision.
    """

    precision: str

    @property
    @abstractmethod
    def label(self) -> str:
        """What tables call it."""

    @property
    def name(self) -> str:
        """Names its folder."""
        return f"{type(self).__name__.lower()}-{self.precision}"

    @property
    def objection(self) -> str:
        """Why this machine cannot execute any network so, or an empty text."""
        return ""

    @abstractmethod
    def make(self, workload: Workload, folder: Path) -> None:
        """Write to ``folder`` what ``load`` needs. Raises ValueError for what the engine cannot execute."""

    @abstractmethod
    def load(self, folder: Path, threads: int) -> Evaluate:
        """What executes the network, on so many threads of a CPU."""

    def size(self, folder: Path) -> int:
        """Bytes of what ``make`` has written."""
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
