"""Units that fail as their names say. Workers import this module, and so it imports little."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path

import ray
import torch

from benchmarks.runtime import engine


def do(unit: tuple[str, Path]) -> None:
    """Note where a unit runs, a line each time, and do what its name says."""
    name, folder = unit
    first = not (folder / name).exists()
    about = ray.get_runtime_context().get_node_id(), os.getpid(), torch.get_num_threads(), os.environ[engine.VARIABLE]
    with (folder / name).open("a") as file:
        print(*about, Path.cwd(), file=file)
    if name == "bad":
        raise ValueError("a bad unit")
    if name == "full" and not (folder / "room").exists():
        raise OSError(errno.ENOSPC, "No space left on device")
    if name == "killed" and first:
        os.kill(os.getpid(), signal.SIGKILL)
    while name.startswith("long") and not (folder / "node lost").exists():
        time.sleep(0.05)


def then(unit: tuple[str, Path]) -> list[tuple[str, Path]]:
    name, folder = unit
    return [(name + "+", folder)] if name in ("a", "bad") else []
