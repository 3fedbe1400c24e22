"""Where a quantisation keeps what it has learned, and its calibration rows while they wait for a block.

The result of each unit of learning is kept under an address, the hash of all that decides it (`Session.address` in
`tfmq.session`). So a run that was stopped goes on after its last unit, a run that begins like an earlier one takes over
what that has learned, and one that differs, in a setting or in the code that a pass imports, finds nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

Allocate = Callable[[int, torch.dtype], Tensor]


class Workspace:
    """Saves nothing; rows between blocks stay in memory.

    Attributes:
        allocate: gives a flat CPU tensor of (elements, dtype), such as a mapped file, for rows that memory does not
            hold; None refuses such rows.
    """

    keeps = False
    allocate: Allocate | None = None

    def get(self, address: str) -> dict[str, Tensor] | None:
        """What was put at ``address``, or None."""
        return None

    def put(self, address: str, tensors: dict[str, Tensor]) -> None:
        """Save ``tensors``, which are on the CPU; an interrupted write must leave no entry."""


@dataclass
class FolderWorkspace(Workspace):
    """Keeps one safetensors file for each address in ``folder``. It may be deleted at any time."""

    folder: Path
    allocate: Allocate | None = None
    keeps = True

    def get(self, address: str) -> dict[str, Tensor] | None:
        """See `Workspace`. Raises ValueError for a file that is damaged."""
        path = self._path(address)
        if not path.is_file():
            return None
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}): delete it, and it is learned again") from None

    def put(self, address: str, tensors: dict[str, Tensor]) -> None:
        """See `Workspace`."""
        path = self._path(address)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            # Each with memory of its own, which safetensors asks for.
            save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, temporary)
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def _path(self, address: str) -> Path:
        return Path(self.folder) / f"{address}.safetensors"
