"""Archives for tests."""

from __future__ import annotations

import zipfile
from pathlib import Path


def pack(path: Path, **members: bytes) -> Path:
    """Write a zip archive of members by name."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path
