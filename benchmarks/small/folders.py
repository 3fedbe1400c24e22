"""Where the steps read and write."""

import errno
from pathlib import Path

HERE = Path(__file__).parent
BUILD = HERE / "build"
LOGS = HERE / "logs"
FIGURES = HERE / "figures"
PUBLISHED = HERE.parent.parent / "data"
PROMPTS = HERE.parent / "prompts"


def made(folder: Path) -> Path:
    """The folder of an earlier step; FileNotFoundError if it is not there, where loading would try the network."""
    if not folder.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such folder", str(folder))
    return folder
