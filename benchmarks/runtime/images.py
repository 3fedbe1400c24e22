"""The images of a cell: a folder with a file for each generation batch, read a few images at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

TENSOR = "images"


def batch_name(index: int) -> str:
    """Name of the file of a generation batch."""
    return f"{index:05d}.safetensors"


@dataclass(frozen=True)
class Images:
    """Images in files that hold one tensor each, ``images`` uint8 (B, 3, H, W); their order is that of the files.

    What is read raises ValueError for a file that is missing or damaged, saying what to run.
    """

    folder: Path

    @cached_property
    def files(self) -> list[Path]:
        """The files in their order."""
        found = sorted(self.folder.glob("*.safetensors"))
        if not found or [path.name for path in found] != [batch_name(index) for index in range(len(found))]:
            raise ValueError(f"images are missing in {self.folder}: run `dvc repro`, which makes them")
        return found

    @cached_property
    def shapes(self) -> list[tuple[int, int, int, int]]:
        """The shape of each file's images; only the headers are read."""
        return [_shape(path) for path in self.files]

    @cached_property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, 3, H, W); only the files' headers are read."""
        if len({shape[1:] for shape in self.shapes}) > 1:
            raise ValueError(f"images in {self.folder} are of several sizes: delete it and run `dvc repro`")
        return (sum(shape[0] for shape in self.shapes), *self.shapes[0][1:])

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, images: range) -> Tensor:
        """The images of these indices, uint8 (B, 3, H, W); only files that hold any of them are read."""
        parts, first = [], 0
        for path, (count, *_) in zip(self.files, self.shapes, strict=True):
            rows = slice(max(images.start - first, 0), min(images.stop - first, count))
            if rows.start < rows.stop:
                parts.append(_read(path)[rows])
            first += count
        return torch.cat(parts)

    def batches(self, size: int) -> Iterator[Tensor]:
        """All images in their order, ``size`` at a time, the last ones fewer; uint8 (B, 3, H, W)."""
        waiting: list[Tensor] = []
        count = 0
        for path in self.files:
            part = _read(path)
            waiting.append(part)
            count += len(part)
            if count < size:
                continue
            held = torch.cat(waiting)
            whole = count - count % size
            yield from held[:whole].split(size)
            waiting, count = [held[whole:]], count - whole
        if count:
            yield torch.cat(waiting)

    def first(self, count: int) -> Tensor:
        """The first ``count`` images, or all where there are fewer."""
        return next(self.batches(count))


def _shape(path: Path) -> tuple[int, int, int, int]:
    try:
        with safe_open(path, "pt") as file:
            return tuple(file.get_slice(TENSOR).get_shape())
    except SafetensorError as error:
        raise _damaged(path, error) from None


def _read(path: Path) -> Tensor:
    try:
        return load_file(path)[TENSOR]
    except (SafetensorError, KeyError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is damaged or truncated ({error}): delete {path.parent} and run `dvc repro`")
