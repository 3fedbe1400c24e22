"""The range of each weight, and rounding weights to nearest in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tqdm.auto import tqdm

from tfmq.cost import Shapes
from tfmq.modules.layers import QuantizedLayer
from tfmq.passes import Memory, Pass
from tfmq.plan import quantized_layers
from tfmq.session import Session
from tfmq.settings import check_choices

WeightRange = Literal["minmax", "search", "thresholds"]


@dataclass(frozen=True)
class WeightRanges(Pass):
    """Give every weight its range in each output channel, or in each group of its input channels.

    Attributes:
        range: ``minmax``; ``search`` for the smallest |w - w_hat|^2.4 among 80 ranges; ``thresholds`` for the same
            among PTQ4DM's 100 symmetric ones.
    """

    range: WeightRange = "search"

    sees_activations = False

    def __post_init__(self) -> None:
        check_choices(self)

    def run(self, session: Session, rows: None) -> None:
        """See `Pass`."""
        for layer in tqdm(quantized_layers(session.network).values(), desc=self.name, disable=None):
            layer.find_weight_range(self.range)

    def memory(self, shapes: Shapes, rows: None) -> Memory:
        """See `Pass`. A search tries one candidate after the other where a weight is large, and rounds to compare."""
        return Memory(shapes.of_largest_layer(_round))


@dataclass(frozen=True)
class RoundToNearest(Pass):
    """Round all weights that no earlier pass has rounded to the nearest point of their grids."""

    sees_activations = False

    def run(self, session: Session, rows: None) -> None:
        """See `Pass`."""
        for layer in quantized_layers(session.network).values():
            if layer.codes is None:
                layer.fold()

    def memory(self, shapes: Shapes, rows: None) -> Memory:
        """See `Pass`."""
        return Memory(shapes.of_largest_layer(_round))


def _round(layer: QuantizedLayer) -> None:
    layer.find_weight_range("minmax")
    layer.fold()
