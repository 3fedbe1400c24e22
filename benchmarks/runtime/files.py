"""Where things lie, and writing them so that no half-written file ever stands under its final name."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor

from benchmarks.runtime import manifest
from benchmarks.runtime.images import Images
from benchmarks.suite.record import FULL_PRECISION, Cell

RECORDS = Path("results/records")
RESULTS = Path("results")
WORK = Path("work")
RESUME = Path(".resume")
# What quantisations have learned, for all that begin alike: a folder for each task, which may be deleted at any time.
LEARNED = WORK / "learned"

# Files of a cell: the folder of its images (see `images`); errors against full precision; the full-precision
# cell's inputs and predictions at each step; its first images in float32, where the others are in TF32; the quantised
# checkpoint; settings, cost and what else is known of it.
IMAGES = "images"
ERRORS = "errors.safetensors"
TRAJECTORY = "trajectory.safetensors"
FLOAT32 = "float32.safetensors"
QUANTIZED = "quantized.safetensors"
OUTCOME = "outcome.json"
# What recording one calibration pool cost; beside the pools.
COST = "cost.json"


def calibration(task: str) -> Path:
    """Folder of a task's calibration pools."""
    return WORK / "calibration" / task


def pool(seed: int) -> str:
    """Name of the file of a calibration seed's pool."""
    return "pool.safetensors" if seed == 0 else f"pool-s{seed}.safetensors"


def reference(task: str) -> Path:
    """Folder of a task's reference features."""
    return WORK / "reference" / task


def paired(task: str) -> Path:
    """Folder of the features of a task's full-precision images, which every cell is paired with."""
    return WORK / "paired" / task


def cell_folder(cell: Cell) -> Path:
    """Folder of a cell's images, checkpoint and cost."""
    return WORK / "cells" / cell.name


def read_images(cell: Cell) -> Images:
    """The images of a cell, of which none is in memory yet. Raises ValueError if there are none, saying what to run."""
    images = Images(cell_folder(cell) / IMAGES)
    len(images)
    return images


def full_precision_cell(cell: Cell) -> Cell:
    """The full-precision cell that ``cell`` is compared with: same task, same noise."""
    return Cell(cell.task, FULL_PRECISION, "w32a32")


def record_file(cell: Cell) -> Path:
    """The record of a cell."""
    return RECORDS / f"{cell.name}.json"


def _temporary(path: Path) -> Path:
    """A name beside ``path`` that no other process takes, on this machine or another one."""
    return path.with_name(f".{path.name}.{uuid4().hex}")


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file through a temporary name beside it, synced to disk before it takes its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(path, text.encode())


def write_json(path: Path, content: object) -> None:
    """`write_bytes` of indented JSON. Raises ValueError for numbers that are not finite."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """`write_bytes` of a safetensors file."""
    write_bytes(path, serialize({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata))


def sha256(path: Path) -> str:
    """Hash of a file that a stage makes. Raises ValueError if it is missing, saying what to run."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: run `dvc repro`, which makes it")
    return manifest.sha256(path)


def sha256_folder(path: Path) -> str:
    """One hash over the names and contents of a folder's files. Raises ValueError if there are none."""
    found = sorted(each for each in path.rglob("*") if each.is_file())
    if not found:
        raise ValueError(f"{path} is missing: run `dvc repro`, which makes it")
    digest = hashlib.sha256()
    for each in found:
        digest.update(json.dumps([each.relative_to(path).as_posix(), manifest.sha256(each)]).encode())
    return digest.hexdigest()


def link(source: Path, target: Path) -> None:
    """Let a finished file stand at a second place: the same file where the file system allows, else a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file. Raises ValueError if it is missing or damaged, saying what to run."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: run `dvc repro`, which makes it")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or truncated ({error}): delete it and run `dvc repro`") from None


def read_json(path: Path) -> dict:
    """Content of a JSON file. Raises ValueError if it is missing or damaged, saying what to run."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: run `dvc repro`, which makes it")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged or truncated ({error}): delete it and run `dvc repro`") from None


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill that takes its final name when all is written, replacing an earlier one; else it vanishes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    temporary.mkdir()
    try:
        yield temporary
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def exclusive(folder: Path, name: str) -> Iterator[None]:
    """A folder that no other process works in meanwhile; it is made where it is missing.

    Raises ValueError if another process does, saying so of ``name``. The lock is a file beside the folder, which goes
    with this process, however that ends.
    """
    path = folder.with_name(f"{folder.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        lock = path.open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise ValueError(f"{name}: another process is at work on it in {folder}: wait for it to end") from None
        if path.exists() and path.stat().st_ino == os.fstat(lock.fileno()).st_ino:
            break
        lock.close()  # the process that held it has just ended, and taken the file away
    with lock:
        folder.mkdir(exist_ok=True)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def mapped(folder: Path, elements: int, dtype: torch.dtype) -> Tensor:
    """A flat tensor whose memory is a file in ``folder`` that is gone with it. Raises OSError for a full disk."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=folder)
    try:
        if hasattr(os, "posix_fallocate"):  # to run out of room here, and not when it is written
            os.posix_fallocate(descriptor, 0, max(elements * dtype.itemsize, 1))
        return torch.from_file(name, shared=True, size=elements, dtype=dtype)
    finally:
        os.close(descriptor)
        os.unlink(name)


def fingerprint(*parts: object) -> str:
    """Short hash that names unfinished work: other settings, inputs or code never continue it."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def source_hash(*roots: Path) -> str:
    """Hash of all Python files under ``roots`` (files or folders)."""
    digest = hashlib.sha256()
    for root in roots:
        for path in [root] if root.is_file() else sorted(root.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()
