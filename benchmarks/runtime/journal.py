"""What a quantisation has learned so far, in a folder, so that a killed run goes on there; and the memory it takes."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.runtime import files

MIB = 2**20
PEAK = "peak_memory_mib"


class FolderJournal:
    """A `tfmq.journal.Journal` of one file a unit.

    Attributes:
        peak_memory_mib: most memory that the units which were taken from it took, of the processes that learned them.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder = folder
        self.device = device
        self.peak_memory_mib = 0.0

    def get(self, key: str) -> dict[str, Tensor] | None:
        """What was put under ``key``, or None. Raises ValueError if it is damaged."""
        path = self._path(key)
        if not path.is_file():
            return None
        tensors = files.read_tensors(path)
        self.peak_memory_mib = max(self.peak_memory_mib, tensors.pop(PEAK).item())
        return tensors

    def put(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Keep ``tensors``; the file is there whole or not at all."""
        peak = torch.tensor(peak_memory(self.device), dtype=torch.float64)
        files.write_tensors(self._path(key), tensors | {PEAK: peak})

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"


def restart_peak(device: torch.device) -> None:
    """Let `peak_memory` count from here on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # Linux only; elsewhere the peak is that of all units the process has done
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> float:
    """MiB that this process has held at most, since `restart_peak` where the system can say that."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    status = Path("/proc/self/status")
    if status.exists():
        (peak,) = (line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(peak) / 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB
