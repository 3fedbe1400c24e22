"""What keeps its number type when a network is cast: scales, zero points, codes, tables and corrections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from torch import Tensor, nn


class KeepsTypes(nn.Module):
    """A module whose own buffers keep their types under ``.half()``, ``.to(dtype)`` and so on, and follow devices."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            applied = self._buffers[name]
            if buffer is not None and applied is not None and applied.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(applied.device)
        return self
