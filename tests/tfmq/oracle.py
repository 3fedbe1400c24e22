"""Reads the oracle vectors of the published codes; tests/data/oracle/README.md explains them."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parents[1] / "data" / "oracle"


@cache
def tensors(case: str) -> dict[str, Tensor]:
    """All tensors of a case, such as ``01_fake_quant``, by name. They are shared: do not change them in place."""
    return load_file(FOLDER / f"{case}.safetensors")


@cache
def listed(case: str) -> tuple[str, ...]:
    """The names in the case's JSON list, in its order."""
    description = json.loads((FOLDER / f"{case}.json").read_text())
    return tuple(tensor["name"] for tensor in description["tensors"])


def each(case: str, pattern: str) -> pytest.MarkDecorator:
    """Parametrise a test with ``match``, one for each listed name that ``pattern`` matches in full."""
    matches = [match for name in listed(case) if (match := re.fullmatch(pattern, name))]
    if not matches:
        raise ValueError(f"nothing in {case} matches {pattern!r}")
    return pytest.mark.parametrize("match", matches, ids=[match[0] for match in matches])


def regularizer(h, beta):
    """AdaRound's regulariser, the sum over weights of 1 - |2h - 1|^beta (arXiv 2004.10568, eq. 24)."""
    return (1 - (2 * h - 1).abs().pow(beta)).sum()
