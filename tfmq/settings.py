"""Checks of settings: what is misspelt or out of range is refused at once, not hours later."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from numbers import Integral, Real
from types import NoneType
from typing import Literal, get_args, get_origin, get_type_hints


def unknown(name: str, value: object, allowed: Iterable[str]) -> ValueError:
    """The error for a value that is not among ``allowed``: names them, and the nearest one where there is one."""
    allowed = sorted(allowed)
    nearest = difflib.get_close_matches(str(value), allowed, n=1)
    guess = f"did you mean {nearest[0]!r}? " if nearest else ""
    return ValueError(f"unknown {name} {value!r}: {guess}Allowed: {', '.join(allowed)}.")


def check_choices(settings: object) -> None:
    """Raise ValueError for a field of the dataclass ``settings`` with a value that its Literal type does not allow."""
    for name, hint in get_type_hints(type(settings)).items():
        options = (hint,) if get_origin(hint) is Literal else get_args(hint)
        allowed = [choice for option in options if get_origin(option) is Literal for choice in get_args(option)]
        value = getattr(settings, name)
        if allowed and value not in allowed and not (value is None and NoneType in options):
            raise unknown(name, value, allowed + (["None"] if NoneType in options else []))


def check_counts(settings: object, *names: str, least: int = 1) -> None:
    """Raise ValueError for a field among ``names`` that is not a whole number of at least ``least``."""
    for name in names:
        value = getattr(settings, name)
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} is {value!r}: it must be a whole number of at least {least}")


def check_numbers(settings: object, *names: str, least: float = -math.inf, most: float = math.inf) -> None:
    """Raise ValueError for a field among ``names`` that is not a finite number from ``least`` to ``most``."""
    for name in names:
        value = getattr(settings, name)
        if not _is_number(value) or not least <= value <= most:
            raise ValueError(f"{name} is {value!r}: it must be a finite number, from {least:g} to {most:g}")


def check_positive(settings: object, *names: str) -> None:
    """Raise ValueError for a field among ``names`` that is not a finite number above 0."""
    for name in names:
        value = getattr(settings, name)
        if not _is_number(value) or value <= 0:
            raise ValueError(f"{name} is {value!r}: it must be a finite number above 0")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
