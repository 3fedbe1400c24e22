"""What stays in floats between integer layers, a part at a time: so that it stays in the cache of a core."""

from __future__ import annotations

import torch
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from tfmq.modules.integer import IntegerLayer
from tfmq.modules.integer_products import CACHED

# Torch's own group norm of channels-last memory takes its time by the pixel, this one by the channel.
MOST_CHANNELS = 128
LEAST_PIXELS = 64
LEAST_ROWS = 64


class RowsFeedForward(nn.Module):
    """The feed-forward part of a transformer block, some tokens at a time: on a CPU several times as fast.

    Its hidden layer is the largest tensor of a network.

    Attributes:
        net: as in ``FeedForward``.
    """

    def __init__(self, original: FeedForward) -> None:
        super().__init__()
        self.net = original.net
        self.tracker = self._layers()[0].tracker
        self.at_once = max(LEAST_ROWS, 4 * CACHED // max(layer.weights[0].codes.shape[0] for layer in self._layers()))

    @classmethod
    def suits(cls, module: nn.Module) -> bool:
        """Whether ``module`` is one whose layers all are in integers."""
        linear = [part for part in module.modules() if isinstance(part, nn.Linear | IntegerLayer)]
        return type(module) is FeedForward and bool(linear) and all(isinstance(part, IntegerLayer) for part in linear)

    def _layers(self) -> list[IntegerLayer]:
        return [part for part in self.net.modules() if isinstance(part, IntegerLayer)]

    @torch.no_grad()
    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, tokens, C); tokens of images at several time steps are not divided."""
        if hidden_states.device.type != "cpu" or isinstance(self.tracker.index, Tensor):
            return self._whole(hidden_states)
        rows = hidden_states.flatten(0, -2)
        output: Tensor | None = None
        for start in range(0, len(rows), self.at_once):
            part = self._whole(rows[start : start + self.at_once])
            if output is None:
                output = part.new_empty(len(rows), part.shape[-1])
            output[start : start + self.at_once] = part
        return self._whole(hidden_states) if output is None else output.view(*hidden_states.shape[:-1], -1)

    def _whole(self, hidden_states: Tensor) -> Tensor:
        for module in self.net:
            hidden_states = module(hidden_states)
        return hidden_states


class ChannelsLastGroupNorm(nn.GroupNorm):
    """A group norm that is not slow where few channels lie beside one another in memory."""

    @classmethod
    def of(cls, norm: nn.GroupNorm) -> ChannelsLastGroupNorm:
        """The twin of ``norm``, sharing its parameters."""
        twin = cls(norm.num_groups, norm.num_channels, norm.eps, affine=False)
        twin.weight, twin.bias, twin.affine = norm.weight, norm.bias, norm.affine
        return twin.train(norm.training)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W): the variance is the mean of squares without the square of the mean, as in torch's."""
        if not self._takes(x):
            return super().forward(x)
        output = torch.empty_like(x)
        images = max(1, CACHED // x[0].numel())
        squares = torch.empty_like(x[:images])
        for given, normal in zip(x.split(images), output.split(images), strict=True):
            sums = given.sum((2, 3)), torch.mul(given, given, out=squares[: len(given)]).sum((2, 3))
            by_group = torch.stack(sums).unflatten(2, (self.num_groups, -1))
            mean, square = by_group.sum(3, keepdim=True) / (by_group.shape[3] * x.shape[2] * x.shape[3])
            deviation = (square - mean * mean).clamp_min_(0).add_(self.eps).rsqrt_()
            factor = deviation * self.weight.view(self.num_groups, -1)
            shift = torch.addcmul(self.bias.view(self.num_groups, -1), mean, factor, value=-1)
            torch.addcmul(shift.view(-1, x.shape[1], 1, 1), given, factor.view(-1, x.shape[1], 1, 1), out=normal)
        return output

    def _takes(self, x: Tensor) -> bool:
        suits = self.affine and x.device.type == "cpu" and x.dim() == 4 and x.shape[1] <= MOST_CHANNELS
        if not suits or x.shape[2] * x.shape[3] < LEAST_PIXELS or not len(x):
            return False
        return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
