"""SHA-256 of every file of a folder, kept beside them, so that damage is found before anything is read."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

NAME = "manifest.json"
AGAIN = "run `dvc pull data.dvc`, or `dvc repro` in the paper suite"


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(folder: Path) -> None:
    """Write ``manifest.json`` into ``folder``: relative path -> SHA-256 of every other file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != NAME)
    hashes = {path.relative_to(folder).as_posix(): sha256(path) for path in files}
    (folder / NAME).write_text(json.dumps(hashes, indent=2) + "\n", encoding="utf-8")


def verify(folder: Path) -> str:
    """Check every file of ``folder`` against its manifest; returns the manifest's own SHA-256, which names them all.

    Raises ValueError naming the folder or file that is missing or whose content has changed.
    """
    listing = folder / NAME
    if not listing.is_file():
        raise ValueError(f"there is no checkpoint in {folder} ({NAME} is missing): {AGAIN}")
    try:
        hashes = dict(json.loads(listing.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise ValueError(f"{listing} is damaged: delete it and {AGAIN}") from None
    for name, expected in hashes.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing: {AGAIN}")
        if sha256(path) != expected:
            raise ValueError(f"{path} is damaged (its SHA-256 is not the manifest's): delete it and {AGAIN}")
    return sha256(listing)
