"""A margin around the ranges of activations, so that few calibration images will do.

The extremes of a tensor over n images lie inside those over more. What lies outside a range is clipped, and at 8 bits
one clipped outlier costs an image more than a wider step costs all of them: it turns into another picture. A margin
stands for the images that were not observed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tfmq.modules.fake_quantize import FEW_BITS
from tfmq.passes import Pass
from tfmq.plan import activation_quantizers
from tfmq.session import Session
from tfmq.settings import check_numbers


@dataclass(frozen=True)
class RangeMargin(Pass):
    """Widen the ranges of activations of 6 bits or more, at both ends by the same share; goes after `ActivationRanges`.

    With scale s, zero point z and margin m the grid s (q - z) becomes (1 + m) s (q - z). Attention probabilities keep
    their range, which nothing exceeds, and so do activations of fewer bits, where each step counts.

    Attributes:
        margin: m, a share of the range.
    """

    margin: float = 0.2

    def __post_init__(self) -> None:
        check_numbers(self, "margin", least=0)

    @torch.no_grad()
    def run(self, session: Session, rows: None) -> None:
        """See `Pass`."""
        for quantizer in activation_quantizers(session.network).values():
            if quantizer.enabled and quantizer.bits >= FEW_BITS and not quantizer.positive:
                quantizer.scale = quantizer.scale * (1 + self.margin)
