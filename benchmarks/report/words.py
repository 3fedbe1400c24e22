"""Pieces of sentences and tables that pages on verdicts have in common."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.report.inference import Estimate


def ratio(found: Estimate) -> str:
    """The ratio of errors whose logarithm is ``found``, with its 95 % interval."""
    value = found.value
    return f"{np.exp(value.value):.2f} [{np.exp(value.low):.2f}, {np.exp(value.high):.2f}]"


def named(names: Sequence[str]) -> str:
    """Names in brackets after a space; nothing where there is none."""
    return f" ({', '.join(names)})" if names else ""


def line(fields: Sequence[str]) -> str:
    """One line of a Markdown table."""
    return f"| {' | '.join(fields)} |"
