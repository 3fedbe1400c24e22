"""The methods: one file each, a recipe over `tfmq`.

A file holds ``METHOD``, and with that is in the suite. It imports `tfmq` only; methods never import each other. The
module's docstring says what the method is and where its code and its paper differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from tfmq.effort import PlannedEffort, planned_effort
from tfmq.memory import planned_memory
from tfmq.network.calibration import CalibrationRows, CalibrationSet
from tfmq.network.unet import UNet
from tfmq.plan import Protocol
from tfmq.precision import Precision
from tfmq.quantization import QuantizationConfig, QuantizationReport

Arguments = tuple[QuantizationConfig, CalibrationRows, CalibrationRows, Protocol]


@dataclass(frozen=True)
class Held:
    """Bytes that quantising holds in memory, and those of the rows that wait on the disk meanwhile."""

    memory: int
    disk: int


class Settings:
    """What the settings of every method can say before anything is done: what quantising will spend.

    Network and pool may be on the meta device: only structure, shapes and time steps are looked at.
    """

    def arguments(self, pool: CalibrationSet, protocol: Protocol, generator: torch.Generator) -> Arguments:
        """What `tfmq.quantization.quantize_` is given: its settings, rows, rows for activation ranges, protocol."""
        raise NotImplementedError

    def effort(self, unet: UNet, pool: CalibrationSet, precision: Precision, protocol: Protocol) -> PlannedEffort:
        """What quantising will spend: as much as the report will say, or at most so much where data decide."""
        return planned_effort(unet, precision, *self.arguments(pool, protocol, torch.Generator()))

    def memory(self, unet: UNet, pool: CalibrationSet, precision: Precision, protocol: Protocol) -> Held | None:
        """About what quantising will hold; None where that is not known. ``unet`` is on the meta device."""
        setting, *rest = self.arguments(pool, protocol, torch.Generator())
        planned = planned_memory(unet, precision, setting, *rest)
        waiting = planned.waiting if planned.waiting > setting.memory_bytes else 0
        return Held(planned.total - waiting, waiting)


@dataclass(frozen=True)
class Method:
    """A post-training quantisation method.

    Attributes:
        label: its name in the tables.
        source: where it comes from.
        config: a frozen dataclass of settings, `Settings` with fields; the defaults are the paper's.
        quantize: quantises a UNet in place from a calibration pool, at a precision, with settings of type ``config``,
            the layers of a protocol; the generator is its only source of randomness.
        objection: why the method does not apply at a precision, or an empty text.
        published: the layers that its own code or paper quantises, or None where these are not known.
    """

    label: str
    source: str
    config: type
    quantize: Callable[[UNet, CalibrationSet, Precision, object, torch.Generator, Protocol], QuantizationReport]
    objection: Callable[[Precision], str]
    published: Protocol | None = None


def applies_always(precision: Precision) -> str:
    """The objection of a method that has none."""
    return ""


def needs_8_bit_activations(precision: Precision) -> str:
    """The objection of methods that other authors report to fail at 4-bit activations."""
    if precision.activation_bits >= 8:
        return ""
    return "reported to fail below 8-bit activations (QuEST, arXiv 2402.03666, tables 3 to 5), and made for 8"
