"""Writing files so large that the disk may be full: asked before, and said in one line when it happens."""

from __future__ import annotations

import errno
import glob
import os
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


def sweep(path: Path) -> None:
    """Remove what killed processes left of ``path``, under a hidden name that ends with the process's number."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*"):
        number = left.suffix[1:]
        if number.isdigit() and not _runs(int(number)):
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        return True
    return True


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
