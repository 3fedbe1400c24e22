"""Tiny checkpoints of the original codes, with what those codes put out (shared/reference/checkpoints).

They are too large for the repository: tests that need them are skipped where they are absent.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache

import pytest
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from tests import vectors

FOLDER = vectors.folder("checkpoints")
OUTPUTS = "_tiny_io.safetensors"
FAMILIES = sorted(path.name.removesuffix(OUTPUTS) for path in FOLDER.glob(f"*{OUTPUTS}"))


@cache
def described(family: str) -> dict:
    """What the JSON beside a checkpoint says of it; ``tiny`` are the settings of diffusers' classes."""
    return json.loads((FOLDER / f"{family}.json").read_text(encoding="utf-8"))


def heads(family: str) -> int | None:
    """The heads of every attention, where the UNet's settings cannot say it."""
    found = re.search(r"heads=(\d+)", described(family)["tiny"].get("post_init") or "")
    return int(found[1]) if found else None


@cache
def names(family: str) -> frozenset[str]:
    """The names of a family's inputs and outputs."""
    with safe_open(FOLDER / f"{family}{OUTPUTS}", "pt") as file:
        return frozenset(file.keys())


@cache
def outputs(family: str) -> dict[str, Tensor]:
    """The inputs and outputs. They are shared: do not change them in place."""
    return load_file(FOLDER / f"{family}{OUTPUTS}")


def guidance_scale(family: str) -> float:
    """The scale that its samples were guided with."""
    with safe_open(FOLDER / f"{family}{OUTPUTS}", "pt") as file:
        return float((file.metadata() or {}).get("guidance_scale", 1))


def weights(family: str) -> dict[str, Tensor]:
    """The checkpoint's tensors by their original names, of all its files."""
    files = [path for path in sorted(FOLDER.glob(f"{family}_tiny*.safetensors")) if not path.name.endswith(OUTPUTS)]
    return {name: tensor for path in files for name, tensor in load_file(path).items()}


def those(what: str, found: Sequence[object], arguments: int = 1) -> Sequence[object]:
    """Values of a test's ``arguments``, or values that skip the test and say that there is no ``what``."""
    skipped = pytest.mark.skip(reason=f"there is no {what} in {FOLDER}")
    return found or [pytest.param(*[None] * arguments, marks=skipped)]
