"""Block formats for weights and inputs: MXINT8 where layers have 8 bits, and integers with E4M3 scales below."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tfmq.network.backbone import Backbone, Network
from tfmq.passes import Pass
from tfmq.passes.rectification import rectified_inputs
from tfmq.plan import LayerPlan, QuantizationPlan
from tfmq.precision import FULL
from tfmq.session import Session
from tfmq.settings import check_counts

BYTE = 8


@dataclass(frozen=True)
class BlockFormats(Pass):
    """Let blocks of consecutive channels of every weight and input share a scale of 8 bits.

    The scales of inputs are computed at run time. Codes of what comes out of a ReLU that an earlier pass has put in
    place begin at 0, but for those with scales that are powers of two, which are signed. The operands of attention are
    no
    layers: they get dynamic ranges, one for each token of a head and each row of probabilities.

    Attributes:
        block: channels that share an E4M3 scale, in layers of fewer than 8 bits.
        wide_block: channels that share a power of two, in layers of 8 bits.
        wide_ends: how many of the blocks of the network at each of its ends, besides its first and last layer, get 8
            bits for weights and inputs, whatever the precision.
    """

    block: int = 16
    wide_block: int = 32
    wide_ends: int = 1

    sees_activations = False

    def __post_init__(self) -> None:
        check_counts(self, "block", "wide_block")
        check_counts(self, "wide_ends", least=0)

    def amend(self, plan: QuantizationPlan, network: Network, backbone: Backbone) -> QuantizationPlan:
        """See `Pass`."""
        ends = self.wide_ends + 1
        wide = (*backbone.blocks[:ends], *backbone.blocks[-ends:])
        not_negative = rectified_inputs(plan, network, backbone)
        layers = {
            path: self._in_blocks(layer, any(block.holds(path) for block in wide), path in not_negative)
            for path, layer in plan.layers.items()
        }
        attentions = {path: replace(attention, dynamic=True) for path, attention in plan.attentions.items()}
        return replace(plan, layers=layers, attentions=attentions)

    def _in_blocks(self, layer: LayerPlan, wide: bool, not_negative: bool) -> LayerPlan:
        weight_bits, activation_bits = layer.weight_bits, layer.activation_bits
        if wide:
            weight_bits = BYTE
            activation_bits = activation_bits if activation_bits == FULL else max(activation_bits, BYTE)
        layer = replace(
            layer,
            weight_bits=weight_bits,
            activation_bits=activation_bits,
            splits=(),
            symmetric=True,
            dynamic=True,
        )
        if weight_bits == BYTE:
            return replace(layer, block=self.wide_block, scales="e8m0", unsigned=False)
        return replace(layer, block=self.block, scales="e4m3", unsigned=not_negative)

    def run(self, session: Session, rows: None) -> None:
        """Nothing: the layers were put in place in these formats."""
