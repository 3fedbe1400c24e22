"""The input of a layer whose channels are divided by factors before they are quantised."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tfmq.modules.layers import QuantizedLayer
from tfmq.modules.number_types import KeepsTypes

DIVIDED = "the channels of its input are divided by factors in floating point"


class ChannelScales(KeepsTypes):
    """Divides the channels of a layer's input by positive factors, and gives it to the layer's own quantiser.

    The layer's weight is multiplied by the same factors, so that the layer stays what it was but for rounding. Factors
    are in the plan as ``channel_scales``, and are stored with the network. Norms and activation functions come before
    most layers, into which the division can not be folded exactly; so it is done where it stands.

    Args:
        quantizer: what quantises the divided input.
        channels: of the input.
        dim: the dimension of the channels.

    Buffers:
        factors: float32 (channels,).
    """

    factors: Tensor

    def __init__(self, quantizer: nn.Module, channels: int, dim: int) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.dim = dim
        self.register_buffer("factors", torch.ones(channels, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        factors = self.factors if self.dim == -1 else self.factors.view(-1, *[1] * (x.dim() - 1 - self.dim))
        return self.quantizer((x / factors).to(x.dtype))

    def extra_repr(self) -> str:
        return f"channels={len(self.factors)}"


def divide_channels(layer: QuantizedLayer) -> None:
    """Let a layer divide the channels of its input, by 1 until it gets factors."""
    dim = 1 if isinstance(layer, nn.Conv2d) else -1
    layer.input_quantizer = ChannelScales(layer.input_quantizer, layer.weight.shape[1], dim)


def divides_channels(layer: QuantizedLayer) -> bool:
    """Whether a layer divides the channels of its input."""
    return isinstance(layer.input_quantizer, ChannelScales)


@torch.no_grad()
def set_factors(layer: QuantizedLayer, factors: Tensor) -> None:
    """Divide the input of a layer that is not rounded yet by ``factors`` (C,), and multiply its weight by them.

    Raises ValueError for a layer that does not divide its input, or is rounded.
    """
    scales = layer.input_quantizer
    if not isinstance(scales, ChannelScales):
        raise ValueError("the layer does not divide the channels of its input: its plan has to say so")
    if layer.codes is not None:
        raise ValueError("the layer is rounded already: its channels are divided before")
    spread = factors.view(-1, *[1] * (layer.weight.dim() - 2))
    before = scales.factors.view(spread.shape)
    layer.weight = nn.Parameter((layer.weight * (spread / before)).to(layer.weight.dtype), requires_grad=False)
    layer.ranged = False
    scales.factors = factors.to(scales.factors)
