"""A folder in which cells are made beside the suite: one process has it, and it links to what they are made from."""

from __future__ import annotations

import fcntl
import platform
import shutil
from io import TextIOWrapper
from pathlib import Path

import diffusers
import torch

from benchmarks.runtime import files

SCRATCH = Path(".resume")
LOCK = ".lock"
# What the suite's paths lead to, and the scratch folder has links to.
LINKED = ("data", "benchmarks", "params.yaml")


def open_scratch(root: Path, device: torch.device, purpose: str = "reproduce") -> tuple[Path, TextIOWrapper]:
    """The scratch folder for a purpose, with this code, these settings and this place, and its lock.

    Folders of other code or settings for the same purpose are removed.

    Raises ValueError if another run is at work in it.
    """
    packages = [root / name for name in ("tfmq", "baselines", "benchmarks")]
    inputs = [root / name for name in ("params.yaml", "data.dvc")]
    inputs += sorted((root / "benchmarks" / "prompts").rglob("*.txt"))
    versions = [platform.python_version(), torch.__version__, diffusers.__version__]
    key = files.fingerprint(files.source_hash(*packages, *filter(Path.is_file, inputs)), str(device), versions)
    folder = root / SCRATCH / f"{purpose}-{key}"
    for superseded in folder.parent.glob(f"{purpose}-{'?' * len(key)}"):
        if superseded != folder and (other := _locked(superseded)) is not None:
            shutil.rmtree(superseded)
            other.close()
    folder.mkdir(parents=True, exist_ok=True)
    lock = _locked(folder)
    if lock is None:
        raise ValueError(f"another run is at work in {folder.relative_to(root)}: wait for it, or stop it")
    for name in LINKED:
        link = folder / name
        link.unlink(missing_ok=True)
        link.symlink_to(root / name)
    return folder, lock


def _locked(folder: Path) -> TextIOWrapper | None:
    """The lock file of a folder, held, or None if another process holds it."""
    lock = (folder / LOCK).open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock
