"""What pages show of a cell besides its record: values of its images, the first of them, errors over time steps.

It stands beside the record, small enough for git, so that tables and figures can be made again where no image is left.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.runtime import files
from benchmarks.suite.record import Cell

# Images that figures show of a cell.
SHOWN = 10
VALUE = "value."


@dataclass(frozen=True)
class Excerpt:
    """What is kept of a cell that was measured.

    Attributes:
        scored: the hash of all its images, as in its record.
        images: the first of them, uint8 (n, 3, H, W).
        values: of all images by metric (N,), where the metric is a mean over images.
        temporal_error: of the temporal features at each step of sampling (T,); None for full precision.
        timesteps: of these steps (T,).
    """

    scored: str
    images: np.ndarray
    values: dict[str, np.ndarray] = field(default_factory=dict)
    temporal_error: np.ndarray | None = None
    timesteps: np.ndarray | None = None


def path_of(cell: Cell) -> Path:
    """Where a cell's excerpt lies: beside its record."""
    return files.record_file(cell).with_suffix(".npz")


def write(cell: Cell, excerpt: Excerpt) -> None:
    """Write the excerpt of a cell; equal excerpts are equal files."""
    write_to(path_of(cell), excerpt)


def write_to(path: Path, excerpt: Excerpt) -> None:
    """Write an excerpt to a file; equal excerpts are equal files."""
    arrays = {VALUE + name: values for name, values in excerpt.values.items()}
    arrays |= {"scored": np.array(excerpt.scored), "images": excerpt.images}
    if excerpt.temporal_error is not None and excerpt.timesteps is not None:
        arrays |= {"temporal_error": excerpt.temporal_error, "timesteps": excerpt.timesteps}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    files.write_bytes(path, buffer.getvalue())


def read(cell: Cell) -> Excerpt:
    """The excerpt of a cell. Raises ValueError if it is missing or damaged, saying what to run."""
    return read_from(path_of(cell))


def read_from(path: Path) -> Excerpt:
    """What `write_to` wrote. Raises ValueError if it is missing or damaged, saying what to run."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: run `dvc repro`, which makes it")
    try:
        with np.load(path, allow_pickle=False) as found:
            arrays = dict(found)
        return Excerpt(
            str(arrays["scored"]),
            arrays["images"],
            {name.removeprefix(VALUE): values for name, values in arrays.items() if name.startswith(VALUE)},
            arrays.get("temporal_error"),
            arrays.get("timesteps"),
        )
    except (KeyError, OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged or truncated ({error}): delete it and run `dvc repro`") from None
