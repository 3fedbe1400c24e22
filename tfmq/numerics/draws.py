"""Letting code that draws its own normal noise use given noise instead."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

NORMAL = (torch.randn, torch.randn_like)
OTHERS = (torch.rand, torch.rand_like, torch.randint, torch.randint_like, torch.randperm, torch.normal)


class GivenNoise(TorchFunctionMode):
    """Inside, the first call of ``torch.randn`` in this thread gives ``noise``; nothing else can be drawn.

    Raises ValueError for a second draw, one of another shape, and one from another distribution. Other threads draw as
    ever, and no generator moves.
    """

    def __init__(self, noise: Tensor) -> None:
        super().__init__()
        self.noise = noise
        self.draws = 0

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Iterable[type],
        args: tuple = (),
        kwargs: dict | None = None,
    ) -> object:
        given = dict(kwargs or {})
        if func in OTHERS:
            raise ValueError(f"noise was given, and torch.{func.__name__} draws something else")
        if func not in NORMAL:
            return func(*args, **given)
        like = args[0] if args else given["size" if func is torch.randn else "input"]
        shape = tuple(like.shape) if isinstance(like, Tensor) else tuple(like)
        if self.draws or shape != tuple(self.noise.shape):
            raise ValueError(
                f"noise of shape {tuple(self.noise.shape)} was given for one draw, and draw {self.draws + 1} is of "
                f"shape {shape}"
            )
        self.draws += 1
        return self.noise.to(given.get("device") or self.noise.device, given.get("dtype") or self.noise.dtype)
