"""How many bytes live at once while code runs: on the meta device, where tensors have shapes and no memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CONVOLUTION = torch.ops.aten.convolution.default
CONVOLUTION_BACKWARD = torch.ops.aten.convolution_backward.default


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside, from when they are made to when nothing holds them.

    What was there before does not count. While a convolution runs, a copy of each of its arguments and results counts
    too: oneDNN reorders them, and cuDNN's workspaces are of that size.

    Attributes:
        now: bytes that live at present.
        most: that lived at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(
        self,
        function: Callable,
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        found = function(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(found):
            storage = tensor.untyped_storage()
            if storage._cdata not in given:  # neither a view nor changed in place
                given.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.most = max(self.most, self.now + _copies(function, args, found))
        return found

    def _free(self, size: int) -> None:
        self.now -= size


class FusedAttention(TorchFunctionMode):
    """Attention in floating point without its matrix of probabilities, as CPUs and GPUs compute it.

    The meta device has the unfused form alone.
    """

    def __torch_function__(
        self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        if function is functional.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args[:3])[0]
        return function(*args, **(kwargs or {}))


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _copies(function: Callable, args: Sequence[object], found: object) -> int:
    """What the kernels of an operator copy."""
    if function is CONVOLUTION:
        return _bytes(_tensors((args, found)))
    if function is CONVOLUTION_BACKWARD:  # one kernel for the input's gradient, then one for the weight's
        gradient, x, weight = _tensors(args[:3])
        of_input, of_weight, _ = cast("tuple[Tensor | None, ...]", found)
        return max(_bytes([gradient, weight, of_input]), _bytes([gradient, x, of_weight]))
    return 0


def _bytes(tensors: Iterable[Tensor | None]) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
