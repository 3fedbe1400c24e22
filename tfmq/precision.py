"""How many bits weights, activations and attention probabilities get."""

from __future__ import annotations

import re
from dataclasses import dataclass

FULL = 32


@dataclass(frozen=True)
class Precision:
    """Bit widths of a quantised network, written ``w4a8``; 32 bits mean not quantised.

    Attributes:
        weight_bits: 2 to 8, or 32.
        activation_bits: 2 to 16, or 32.
        softmax_bits: of the attention probabilities; None takes ``activation_bits``.
    """

    weight_bits: int
    activation_bits: int
    softmax_bits: int | None = None

    def __post_init__(self) -> None:
        for name in ("weight_bits", "activation_bits", "softmax_bits"):
            bits = getattr(self, name)
            if bits is not None and bits != FULL and not 2 <= bits <= 16:
                raise ValueError(f"{name} is {bits}: choose 2 to 16, or {FULL} for full precision")
        if FULL > self.weight_bits > 8:
            raise ValueError(f"weight_bits is {self.weight_bits}: weights take at most 8 bits, or {FULL}")

    @classmethod
    def parse(cls, text: str) -> Precision:
        """Read ``w4a8``. Raises ValueError for any other form."""
        match = re.fullmatch(r"w(\d+)a(\d+)", text)
        if match is None:
            raise ValueError(f"precision {text!r} is not of the form w<bits>a<bits>, for example w4a8 or w4a32")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"w{self.weight_bits}a{self.activation_bits}"

    @property
    def attention_bits(self) -> int:
        """Bits of the attention probabilities."""
        return self.activation_bits if self.softmax_bits is None else self.softmax_bits

    @property
    def quantizes_activations(self) -> bool:
        return self.activation_bits < FULL

    @property
    def is_full(self) -> bool:
        return self.weight_bits == FULL and self.activation_bits == FULL
