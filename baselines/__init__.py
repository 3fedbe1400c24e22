"""The methods: one file each, a recipe over `tfmq`.

A file holds ``METHOD``, and with that is in the suite. It imports `tfmq` only; methods never import each other. The
module's docstring says what the method is and where its code and its paper differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from tfmq.calibration import CalibrationSet
from tfmq.plan import Protocol
from tfmq.precision import Precision
from tfmq.quantization import QuantizationReport
from tfmq.unet import UNet


@dataclass(frozen=True)
class Method:
    """A post-training quantisation method.

    Attributes:
        label: its name in the tables.
        source: where it comes from.
        config: a frozen dataclass of settings; the defaults are the paper's.
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
