"""The methods: one file each, a recipe over `tfmq`.

A file with a ``METHOD`` is part of the suite. It imports `tfmq` only; methods never import each other. A recipe that
rows share is in a file whose name starts with ``_``, such as ``_brecq.py`` for TFMQ-DM and Q-Diffusion. A pass that
only one method makes is in that method's file. The module's docstring says what the method is and where its code and
its paper differ.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from tfmq.passes import Recipe
from tfmq.plan import SHARED, Protocol
from tfmq.precision import Precision


@dataclass(frozen=True)
class Settings(ABC):
    """What the settings of every method have: a frozen dataclass extends this."""

    @abstractmethod
    def recipe(self) -> Recipe:
        """The passes that these settings make, in order."""


@dataclass(frozen=True)
class Method:
    """A post-training quantisation method.

    Attributes:
        label: its name in the tables.
        source: where it comes from.
        config: its settings, a frozen dataclass that extends `Settings`; the defaults are the paper's.
        objection: why the method does not apply at a precision, or an empty text.
        published: the layers that its paper quantises, or its code where the paper does not say; None where neither is
            known.
        as_run: the layers that its released code quantises when it runs; None where no code is known.
    """

    label: str
    source: str
    config: type[Settings]
    objection: Callable[[Precision], str]
    published: Protocol | None = None
    as_run: Protocol | None = None

    def protocol(self, name: str) -> Protocol | None:
        """The layers under the protocol ``shared``, ``published`` or ``as_run``; None where that is not known."""
        return {SHARED.name: SHARED, "published": self.published, "as_run": self.as_run}[name]


def applies_always(precision: Precision) -> str:
    """The objection of a method that has none."""
    return ""


def needs_8_bit_activations(precision: Precision) -> str:
    """The objection of methods that other authors report to fail at 4-bit activations."""
    if precision.activation_bits >= 8:
        return ""
    return "reported to fail below 8-bit activations (QuEST, arXiv 2402.03666, tables 3 to 5), and made for 8"
