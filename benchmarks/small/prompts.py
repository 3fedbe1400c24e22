"""The prompts of the suite's conditional tasks: names of classes, and disjoint lists of the names of emoji."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from benchmarks.small.class_conditional import UNCLASSED
from benchmarks.small.data import Emoji

# Three calibration pools of 128 prompts, and one evaluation prompt for each image of a cell.
CALIBRATION = 384
EVALUATION = 320


def draw_names(rows: Sequence[Emoji]) -> tuple[list[str], list[str]]:
    """Calibration and evaluation prompts: distinct names of images trained on, none in both lists.

    Those whose hash is smallest come first, so any language draws the same ones. Raises ValueError if there are fewer
    names than prompts.
    """
    names = {row.name for row in rows if row.split == "train" and row.category != UNCLASSED}
    if len(names) < CALIBRATION + EVALUATION:
        raise ValueError(f"{CALIBRATION} + {EVALUATION} prompts cannot be drawn from {len(names)} names")
    ordered = sorted(names, key=lambda name: hashlib.sha256(f"prompt:{name}".encode()).digest())
    return ordered[EVALUATION : EVALUATION + CALIBRATION], ordered[:EVALUATION]


def write(folder: Path, calibration: Sequence[str], evaluation: Sequence[str]) -> None:
    """Write both lists to ``folder``, one prompt a line."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, prompts in (("calibration", calibration), ("evaluation", evaluation)):
        (folder / f"{name}.txt").write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")
