"""What lies between integer layers, in place or a part at a time: so that it stays in the cache of a core."""

from __future__ import annotations

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from tfmq.modules.integer import IntegerLayer, IntegerWeight
from tfmq.modules.integer_products import CACHED, InputGrid

LEAST_ROWS = 64
# Where torch's group norm is slow: below so many pixels, and up to so many channels of a group.
MANY_PIXELS, MANY_CHANNELS = 1024, 8


class RowsFeedForward(nn.Module):
    """The feed-forward part of a transformer block, some tokens at a time: its hidden layer is large.

    At 64x64 latents a CPU is then faster, by 6 % or more in a UNet of Stable Diffusion's two upper levels.

    Attributes:
        net: as in ``FeedForward``.
    """

    def __init__(self, original: FeedForward) -> None:
        super().__init__()
        self.net = original.net
        layers = [part for part in self.net.modules() if isinstance(part, IntegerLayer)]
        widest = max(part.codes.shape[0] for part in self.net.modules() if isinstance(part, IntegerWeight))
        self.tracker = layers[0].tracker
        self.at_once = max(LEAST_ROWS, 8 * CACHED // widest)

    @classmethod
    def suits(cls, module: nn.Module) -> bool:
        """Whether ``module`` is one whose layers all are in integers."""
        linear = [part for part in module.modules() if isinstance(part, nn.Linear | IntegerLayer)]
        return type(module) is FeedForward and bool(linear) and all(isinstance(part, IntegerLayer) for part in linear)

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


class PixelsGroupNorm(nn.GroupNorm):
    """Group norm of small images whose channels lie together in memory, where torch's own is slow.

    A variance is the mean of squares around the mean, in float32. Of other images it is torch's.
    """

    def __init__(self, original: nn.GroupNorm) -> None:
        nn.Module.__init__(self)
        self.__dict__ |= original.__dict__

    @classmethod
    def suits(cls, module: nn.Module) -> bool:
        """Whether ``module`` is torch's group norm."""
        return type(module) is nn.GroupNorm and module.affine

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """(N, C, ...)."""
        if not self.takes(x):
            return super().forward(x)
        output = torch.empty_like(x)
        for part, factor, shift, found in zip(*self._affine(x), _some(_pixels(output)), strict=True):
            torch.addcmul(shift, part, factor, out=found)
        return output

    @torch.no_grad()
    def codes_of_silu(self, x: Tensor, grid: InputGrid) -> Tensor:
        """The codes of SiLU of the norm of ``x``, which the norm `takes`."""
        codes = torch.empty_like(x, dtype=torch.uint8)
        for part, factor, shift, found in zip(*self._affine(x), _some(_pixels(codes)), strict=True):
            grid.codes(torch.addcmul(shift, part, factor), silu=True, out=found)
        return codes

    def takes(self, x: Tensor) -> bool:
        """Whether ``x`` is a batch as is needed here; torch's own norm is another one from 1,024 pixels."""
        if x.device.type != "cpu" or x.dim() != 4 or not x.is_contiguous(memory_format=torch.channels_last):
            return False
        pixels = x.shape[2] * x.shape[3]
        return pixels < MANY_PIXELS and pixels * x.shape[1] <= CACHED and x.shape[1] <= MANY_CHANNELS * self.num_groups

    def _affine(self, x: Tensor) -> tuple[tuple[Tensor, ...], ...]:
        """Some images (n, pixels, C) at a time, and a factor and a shift (n, 1, C): their norm is x factor + shift."""
        rows = _pixels(x)
        images, pixels, channels = rows.shape
        of_group = pixels * channels // self.num_groups

        def over_groups(sums: Tensor) -> Tensor:
            means = sums.view(images, self.num_groups, -1).sum(-1, keepdim=True).div_(of_group)
            return means.expand(-1, -1, channels // self.num_groups).reshape(images, 1, channels)

        mean = over_groups(rows.sum(1))
        parts = zip(_some(rows), mean.split(_at_once(rows)), strict=True)
        variance = over_groups(torch.cat([torch.sub(*part).square_().sum(1) for part in parts]))
        factor = variance.add_(self.eps).rsqrt_().mul_(self.weight)
        shift = torch.addcmul(self.bias, mean, factor, value=-1)
        return _some(rows), factor.split(_at_once(rows)), shift.split(_at_once(rows))


def _pixels(x: Tensor) -> Tensor:
    """(N, pixels, C) of channels-last memory."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _at_once(rows: Tensor) -> int:
    return max(1, CACHED // rows[0].numel())


def _some(rows: Tensor) -> tuple[Tensor, ...]:
    """As many images at a time as stay in the cache."""
    return rows.split(_at_once(rows))


def _convolved(norm: PixelsGroupNorm, convolution: IntegerLayer, x: Tensor) -> Tensor:
    """A convolution of SiLU of a norm."""
    grid = convolution.grid
    if grid is None or not norm.takes(x):
        return convolution(norm(x), silu=True)
    return convolution.of_codes(norm.codes_of_silu(x, grid), grid)


class InPlaceResnetBlock(ResnetBlock2D):
    """A residual block that overwrites its own activations; SiLU and rounding read each of them once, together."""

    def __init__(self, original: ResnetBlock2D) -> None:
        nn.Module.__init__(self)
        self.__dict__ |= original.__dict__

    @classmethod
    def suits(cls, module: nn.Module) -> bool:
        """Whether ``module`` is a residual block that only does what is done here, with convolutions in integers."""
        return (
            type(module) is ResnetBlock2D
            and all(isinstance(part, IntegerLayer) for part in (module.conv1, module.conv2))
            and all(isinstance(part, PixelsGroupNorm) for part in (module.norm1, module.norm2))
            and isinstance(module.nonlinearity, nn.SiLU)
            and module.time_embedding_norm == "default"
            and module.upsample is None
            and module.downsample is None
            and module.dropout.p == 0
        )

    @torch.no_grad()
    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args: object, **kwargs: object) -> Tensor:
        """(N, C, H, W), as ``ResnetBlock2D`` computes it."""
        hidden = _convolved(self.norm1, self.conv1, input_tensor)
        if self.time_emb_proj is not None:
            temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))[:, :, None, None]
        if temb is not None:
            hidden += temb
        hidden = _convolved(self.norm2, self.conv2, hidden)
        hidden += input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        return hidden if self.output_scale_factor == 1 else hidden.div_(self.output_scale_factor)


class CodesUpsample(Upsample2D):
    """Repeats codes of pixels instead of their values: they are the same, a quarter as many, and bytes."""

    def __init__(self, original: Upsample2D) -> None:
        nn.Module.__init__(self)
        self.__dict__ |= original.__dict__

    @classmethod
    def suits(cls, module: nn.Module) -> bool:
        """Whether ``module`` repeats pixels for a convolution in integers, and does nothing else."""
        return (
            type(module) is Upsample2D
            and module.norm is None
            and module.interpolate
            and isinstance(getattr(module, "conv", None), IntegerLayer)
        )

    @torch.no_grad()
    def forward(
        self, hidden_states: Tensor, output_size: tuple[int, int] | None = None, *args: object, **kwargs: object
    ) -> Tensor:
        """(N, C, H, W), as ``Upsample2D`` computes it."""
        grid = self.conv.grid
        if output_size is not None or grid is None:
            return super().forward(hidden_states, output_size)
        images, channels, height, width = hidden_states.shape
        pixels = grid.codes(hidden_states).permute(0, 2, 3, 1)[:, :, None, :, None]
        repeated = pixels.expand(images, height, 2, width, 2, channels).reshape(images, 2 * height, 2 * width, channels)
        return self.conv.of_codes(repeated.permute(0, 3, 1, 2), grid)
