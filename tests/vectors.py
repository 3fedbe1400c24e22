"""Where the vectors lie that tests compare with: this repository's, or another set (see CONTRIBUTING.md)."""

from __future__ import annotations

import os
from pathlib import Path

_ROOT = Path(__file__).parents[1]
# The checkpoints are too large for the repository.
_OWN = {kind: _ROOT / "tests" / "data" / kind for kind in ("oracle", "originals", "unets")} | {
    "checkpoints": _ROOT.parent / "shared" / "reference" / "checkpoints"
}
OTHERS = Path(os.environ["TFMQ_VECTORS"]).resolve() if os.environ.get("TFMQ_VECTORS") else None
if OTHERS is not None and not any((OTHERS / kind).is_dir() for kind in _OWN):
    raise ValueError(f"TFMQ_VECTORS is {OTHERS}, which has none of the folders {', '.join(_OWN)}: name one that has")


def folder(kind: str) -> Path:
    """The folder of vectors of a kind: that of the other set if it has one, else this repository's."""
    if OTHERS is not None and (OTHERS / kind).is_dir():
        return OTHERS / kind
    return _OWN[kind]


def replaced(kind: str) -> bool:
    """Whether vectors of a kind are another set's, which may lack some that this repository's has."""
    return folder(kind) != _OWN[kind]
