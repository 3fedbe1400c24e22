"""Reads the oracle vectors of the published codes; tests/data/oracle/README.md explains them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache

import pytest
from safetensors.torch import load_file
from torch import Tensor

from tests import vectors

FOLDER = vectors.folder("oracle")
# What `#` stands for in the patterns of `read`.
_NUMBER = r"(\d+(?:\.\d+)?(?:e-?\d+)?)"


@cache
def tensors(case: str) -> dict[str, Tensor]:
    """All tensors of a case, such as ``01_fake_quant``, by name. They are shared: do not change them in place."""
    path = FOLDER / f"{case}.safetensors"
    if vectors.replaced("oracle") and not path.exists():
        pytest.skip(f"{path} is not there")
    return load_file(path)


@cache
def described(case: str) -> dict:
    """The case's JSON, with its list of tensors as a dictionary by name."""
    path = FOLDER / f"{case}.json"
    if vectors.replaced("oracle") and not path.exists():
        return {"tensors": {}}
    description = json.loads(path.read_text(encoding="utf-8"))
    return description | {"tensors": {tensor["name"]: tensor for tensor in description["tensors"]}}


def each(case: str, pattern: str, where: Callable[[re.Match[str]], bool] = lambda match: True) -> pytest.MarkDecorator:
    """Parametrise a test with ``match``, one for each listed name that ``pattern`` matches in full and ``where`` takes.

    Raises ValueError if there is none; in another set than the repository's, which may lack some, the test is skipped.
    """
    found = [match for name in described(case)["tensors"] if (match := re.fullmatch(pattern, name))]
    matches = [pytest.param(match, id=match[0]) for match in found if where(match)]
    if not matches:
        reason = f"nothing in {FOLDER / case}.json matches {pattern!r}"
        if not vectors.replaced("oracle"):
            raise ValueError(reason)
        matches = [pytest.param(None, marks=pytest.mark.skip(reason=reason))]
    return pytest.mark.parametrize("match", matches)


def said(case: str, name: str) -> str:
    """What the JSON says of a tensor: its meaning and its formula."""
    tensor = described(case)["tensors"][name]
    return "; ".join([tensor["meaning"], described(case)["formulas"].get(tensor.get("formula"), "")])


def settings(case: str) -> str:
    """What the JSON says of the settings of a recorded run."""
    return described(case)["notes"]["settings"]


def read(text: str, pattern: str) -> tuple[float, ...]:
    """The numbers that stand in ``text`` where ``pattern`` has a ``#``. Raises ValueError if it does not match."""
    found = re.search(pattern.replace("#", _NUMBER), text)
    if found is None:
        raise ValueError(f"{text!r} does not say {pattern!r}")
    return tuple(float(number) for number in found.groups())


def regularizer(h, beta):
    """AdaRound's regulariser, the sum over weights of 1 - |2h - 1|^beta (arXiv 2004.10568, eq. 24)."""
    return (1 - (2 * h - 1).abs().pow(beta)).sum()
