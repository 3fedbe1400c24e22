"""The methods: one file each, a recipe over `tfmq`.

A file with a ``METHOD`` is part of the suite. It imports `tfmq` only; methods never import each other. A recipe that
rows share is in a file whose name starts with ``_``, such as ``_brecq.py`` for TFMQ-DM and Q-Diffusion. A pass that
only one method makes is in that method's file. The module's docstring says what the method is and where its code and
its paper differ.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import ClassVar

from tfmq.passes import Recipe
from tfmq.passes.deployable import deployable
from tfmq.plan import SHARED, Protocol
from tfmq.precision import Precision

# The layers of the shared protocol, on grids that integer kernels execute.
DEPLOYABLE = replace(SHARED, name="deployable")


@dataclass(frozen=True)
class Settings(ABC):
    """What the settings of every method have: a frozen dataclass extends this.

    Attributes:
        later: fields that came when there were records of the method already.
    """

    later: ClassVar[tuple[str, ...]] = ()

    def described(self) -> dict[str, object]:
        """The fields, as records hold them: `later` ones only off their defaults, so that older records stay valid."""
        defaults = {field.name: field.default for field in fields(self)}
        found = asdict(self).items()
        return {name: value for name, value in found if name not in self.later or value != defaults[name]}

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
        executable: whether integer kernels execute its grids; not where these are dynamic or logarithmic, have low-rank
            branches or factors for each channel of an input, or change their width over time steps.
    """

    label: str
    source: str
    config: type[Settings]
    objection: Callable[[Precision], str]
    published: Protocol | None = None
    as_run: Protocol | None = None
    executable: bool = True

    def protocol(self, name: str) -> Protocol | None:
        """The layers under the protocol ``shared``, ``published``, ``as_run`` or ``deployable``; None for no such."""
        own = {"published": self.published, "as_run": self.as_run}
        return ({SHARED.name: SHARED, DEPLOYABLE.name: DEPLOYABLE if self.executable else None} | own)[name]

    def lacks(self, protocol: str) -> str:
        """Why the method has no such protocol, or an empty text."""
        if self.protocol(protocol) is not None:
            return ""
        if protocol == DEPLOYABLE.name:
            return "integer kernels do not execute its grids"
        return "no choice of layers of its own is known"


def recipe_under(protocol: str, settings: Settings) -> Recipe:
    """The passes of a method's settings under a protocol: ``deployable`` gives them grids that can be executed."""
    recipe = settings.recipe()
    return deployable(recipe) if protocol == DEPLOYABLE.name else recipe


def applies_always(precision: Precision) -> str:
    """The objection of a method that has none."""
    return ""


def needs_8_bit_activations(precision: Precision) -> str:
    """The objection of methods that other authors report to fail at 4-bit activations."""
    if precision.activation_bits >= 8:
        return ""
    return "reported to fail below 8-bit activations (QuEST, arXiv 2402.03666, tables 3 to 5), and made for 8"
