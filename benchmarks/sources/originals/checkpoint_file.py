"""A published checkpoint, open to read its tensors one by one: a file of torch.save, or of safetensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from benchmarks.sources.archive import Mismatch
from benchmarks.sources.originals import torch_file

# The types of numbers that the published files have, by their names in a safetensors header.
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "I64": torch.int64}
# A safetensors file begins with the length of its header in 8 bytes; a header is an object in JSON.
LENGTH = 8


class Stored(Protocol):
    """What is known of a tensor before it is read."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype | str: ...


class CheckpointFile(Protocol):
    """The tensors of a file, by name; it is open as long as the context of `opened`."""

    tensors: Mapping[str, Stored]

    def read(self, name: str) -> Tensor:
        """The tensor of that name. Raises Mismatch if its numbers are damaged or not all there."""


@dataclass(frozen=True)
class Entry:
    """A line of a safetensors header; the type of numbers has its name there, where torch's is not known."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str


class SafetensorsFile:
    """The tensors of a safetensors file."""

    def __init__(self, file: safe_open) -> None:
        names = file.keys()
        slices = {name: file.get_slice(name) for name in names}
        self.tensors = {
            name: Entry(tuple(part.get_shape()), DTYPES.get(part.get_dtype(), part.get_dtype()))
            for name, part in slices.items()
        }
        self.read = file.get_tensor


@contextmanager
def opened(path: Path) -> Iterator[CheckpointFile]:
    """The file at ``path``, whose first bytes say of which format it is.

    Raises ValueError if it is missing, and Mismatch if it is of neither format, or damaged.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing: fetch it first")
    with path.open("rb") as file:
        start = file.read(LENGTH + 1)
    if start[LENGTH:] != b"{":
        with torch_file.opened(path) as found:
            yield found
        return
    try:
        file = safe_open(path, "pt")
    except SafetensorError as error:
        raise Mismatch(f"it is damaged or truncated ({error})") from None
    with file:
        yield SafetensorsFile(file)
