"""Times of engines: processes that take turns, so that what else the machine does meets all of them alike.

`python -m benchmarks.latency.timing ENGINE FOLDER` is one turn: it loads, evaluates, and prints its seconds as JSON.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.latency import Engine
from benchmarks.latency.engines import engines
from benchmarks.runtime import files
from benchmarks.runtime.workspace import peak_memory

INPUTS = "inputs.safetensors"
MIB = 2**20


@dataclass(frozen=True)
class Turn:
    """What one process has measured.

    Attributes:
        seconds: of each evaluation, but for the first.
        peak_memory_mib: most memory that the process held.
    """

    seconds: tuple[float, ...]
    peak_memory_mib: float


@dataclass(frozen=True)
class Interval:
    """A median with its 95 % interval by order statistics, which assumes no distribution."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """The median of ``values``; of fewer than six the interval is all of them."""
        ordered, count = sorted(values), len(values)
        # The number below the median is binomial: the largest rank with at most 2.5 % below.
        rank, below = 0, 2.0**-count
        while below <= 0.025:
            rank += 1
            below += math.comb(count, rank) / 2**count
        rank = max(rank - 1, 0)
        middle = (ordered[(count - 1) // 2] + ordered[count // 2]) / 2
        return cls(middle, ordered[rank], ordered[count - 1 - rank])


def take_turns(
    names: Sequence[str], folder: Path, threads: int, rounds: int, evaluations: int
) -> dict[str, list[Turn]]:
    """``rounds`` turns of each engine, one engine after the other in each round.

    ``folder`` holds a folder for each engine, and `INPUTS`. Raises ValueError with its last line where one fails.
    """
    turns: dict[str, list[Turn]] = {name: [] for name in names}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # the modules of this process
    for _ in range(rounds):
        for name in names:
            command = [sys.executable, "-m", __name__, name, str(folder), str(threads), str(evaluations)]
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
            if done.returncode:
                raise ValueError(f"{name} failed: {done.stderr.strip().splitlines()[-1]}")
            found = json.loads(done.stdout.splitlines()[-1])
            turns[name].append(Turn(tuple(found["seconds"]), found["peak_memory_mib"]))
    return turns


def named(name: str) -> Engine:
    """The engine of that name."""
    precision = name.rpartition("-")[2]
    return next(engine for engine in engines([precision]) if engine.name == name)


def main(arguments: Sequence[str]) -> None:
    """One turn; see the module."""
    name, folder, threads, evaluations = arguments
    inputs = files.read_tensors(Path(folder) / INPUTS)
    given = inputs["latents"], inputs["timestep"], inputs.get("condition")
    run = named(name).load(Path(folder) / name, int(threads))
    seconds = []
    for _ in range(int(evaluations) + 1):
        start = time.perf_counter()
        run(*given)
        seconds.append(time.perf_counter() - start)
    peak = peak_memory(torch.device("cpu"))
    print(json.dumps({"seconds": seconds[1:], "peak_memory_mib": peak}))


if __name__ == "__main__":
    torch.manual_seed(0)
    main(sys.argv[1:])
