"""Writing files so large that the disk may be full: asked before, and said in one line when it happens."""

from __future__ import annotations

import errno
import shutil
from io import FileIO
from pathlib import Path

AGAIN = "run again, which continues where it stopped"
_FULL = (errno.ENOSPC, errno.EDQUOT)


def check(folder: Path, needed: int) -> None:
    """Raise ValueError if the disk of ``folder`` has fewer than ``needed`` bytes free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"{needed:,} bytes are needed in {folder.resolve()}, but {free:,} are free: make room and {AGAIN}"
        )


def write(file: FileIO, data: bytes) -> None:
    """Write all of ``data`` to an unbuffered file. Raises ValueError if the disk is full."""
    view = memoryview(data)
    try:
        while view:
            view = view[file.write(view) :]
    except OSError as error:
        if error.errno in _FULL:
            raise ValueError(f"the disk of {Path(file.name).resolve().parent} is full: make room and {AGAIN}") from None
        raise
