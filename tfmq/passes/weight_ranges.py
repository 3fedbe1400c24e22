"""The range of each weight, and rounding weights to nearest in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tqdm.auto import tqdm

from tfmq.passes import Pass
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


@dataclass(frozen=True)
class RoundToNearest(Pass):
    """Round all weights that no earlier pass has rounded to the nearest point of their grids."""

    sees_activations = False

    def run(self, session: Session, rows: None) -> None:
        """See `Pass`."""
        for layer in quantized_layers(session.network).values():
            if layer.codes is None:
                layer.fold()
