"""What quantisations have learned, kept in a folder for all cells of a task; and the memory that it took."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.runtime import files
from tfmq.workspace import FolderWorkspace

MIB = 2**20
PEAK = "peak_memory_mib"


@dataclass
class MeasuredWorkspace(FolderWorkspace):
    """A folder workspace that keeps with each unit how much memory the process that learned it took.

    Attributes:
        device: whose memory it is.
        peak_memory_mib: the most that the units which were taken from it took.
    """

    device: torch.device = field(kw_only=True)
    peak_memory_mib: float = 0.0

    def get(self, address: str) -> dict[str, Tensor] | None:
        """See `FolderWorkspace`."""
        tensors = super().get(address)
        if tensors is not None:
            self.peak_memory_mib = max(self.peak_memory_mib, tensors.pop(PEAK).item())
        return tensors

    def put(self, address: str, tensors: dict[str, Tensor]) -> None:
        """See `FolderWorkspace`; processes of several machines may learn the same at a time."""
        peak = torch.tensor(peak_memory(self.device), dtype=torch.float64)
        # Each with memory of its own, which safetensors asks for.
        own = {name: tensor.clone() for name, tensor in tensors.items()}
        files.write_tensors(self._path(address), own | {PEAK: peak})


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
