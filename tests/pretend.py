"""A pretend accelerator: tensors on a device of their own, whose values the CPU computes.

As on CUDA, an operation on tensors of several devices fails, but for numbers (0-dimensional tensors of the CPU) and
indices, which CUDA takes from the CPU. What makes the host wait for the device is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
aten = torch.ops.aten
# Results whose size depends on values, and values themselves: the host waits for all work before.
WAITS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.repeat_interleave.Tensor,
    aten.bincount.default,
}
# Numbers of the CPU do not do where no broadcasting happens.
STRICT = {aten.mm.default, aten.bmm.default, aten.addmm.default, aten.convolution.default, aten.cat.default}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default, aten.index_put.default}
COPIES = {aten.copy_.default, aten._copy_from.default}
waits: Counter[str] = Counter()
_inverses = False


class PretendTensor(torch.Tensor):
    """A tensor on the pretend device; ``held`` has its values, on the CPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> PretendTensor:
        found = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
            requires_grad=False,
        )
        found.held = held
        return found

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False):
        if not force:
            raise TypeError(f"can't convert {NAME} device type tensor to numpy: use Tensor.cpu() first")
        return self.cpu().numpy()

    def __repr__(self) -> str:
        return f"pretend {self.held!r}"


def dispatch(func, args, kwargs):
    """Compute on what is held, after checking devices."""
    flat, _ = tree_flatten((args, kwargs))
    tensors = [each for each in flat if isinstance(each, torch.Tensor)]
    there = [each for each in tensors if isinstance(each, PretendTensor)]
    asked = kwargs.get("device")
    if there:
        check(func, args, tensors)
    if func in WAITS and there:
        waits[str(func)] += 1
    if func in INDEXING and any(
        isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1] if i is not None
    ):
        waits["mask"] += 1
    if func in COPIES and len(there) == 1 and not isinstance(args[0], PretendTensor):
        args[0].copy_(args[1].held)
        waits["to cpu"] += 1
        return args[0]
    if _inverses and func in (aten.div.Tensor, aten.div_.Tensor) and there and is_number(args[1]):
        func, args = (aten.mul.Tensor if func is aten.div.Tensor else aten.mul_.Tensor), (args[0], 1 / args[1])
    if func is aten._fused_sdp_choice.default:
        return 0  # the products one by one
    here = asked is not None and torch.device(asked).type != NAME
    if here and there:
        waits["to cpu"] += 1
    given = tree_map(lambda each: each.held if isinstance(each, PretendTensor) else each, (args, dict(kwargs)))
    if asked is not None:
        given[1]["device"] = torch.device("cpu")
    out = func(*given[0], **given[1])
    if here:
        return out
    out = tree_map(lambda each: PretendTensor(each) if isinstance(each, torch.Tensor) else each, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if there else out


def is_number(given) -> bool:
    """Whether CUDA takes it as a number: of these it multiplies by the inverse."""
    return not isinstance(given, PretendTensor) and (not isinstance(given, torch.Tensor) or not given.dim())


def check(func, args, tensors) -> None:
    """Raise RuntimeError where CUDA would for tensors of several devices."""
    if func in COPIES:
        return
    if func in INDEXING and isinstance(args[0], PretendTensor):
        tensors = [args[0], *args[2:3]]
    others = [each for each in tensors if not isinstance(each, PretendTensor)]
    if any(each.dim() > 0 or func in STRICT for each in others):
        shapes = [(type(each).__name__, tuple(each.shape)) for each in tensors]
        raise RuntimeError(f"{func}: tensors on several devices: {shapes}")
    if others and not isinstance(args[0], PretendTensor) and func._schema.name.endswith("_"):
        raise RuntimeError(f"{func}: written on the CPU from the device")


class _Backend:
    """What torch asks a device's module for."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """Nothing is drawn there."""

    def device_count(self) -> int:
        return 1


def _unseen(func, *args, **kwargs):
    """Operations without a tensor of the device among their arguments: those that make one."""
    return dispatch(func, args, kwargs)


_setup_privateuseone_for_python_backend(NAME, _Backend())
DEVICE = torch.device(NAME, 0)
_library = torch.library.Library("_", "IMPL")
_library.fallback(_unseen, "PrivateUse1")


class _Made(TorchFunctionMode):
    """`torch.tensor`, and an index that is a list, build on the CPU: at the device they would bypass what is here."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == NAME:
            del kwargs["device"]
            if isinstance(args[0], PretendTensor):
                return func(*args, **kwargs)
            return func(*args, **kwargs).to(DEVICE)
        if func is torch.Tensor.__getitem__ and isinstance(args[0], PretendTensor):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            args = args[0], tuple(torch.tensor(each) if isinstance(each, list) else each for each in index)
        return func(*args, **kwargs)


@contextmanager
def accelerator(inverses: bool = False) -> Iterator[Counter[str]]:
    """Inside, the pretend device can be used; gives what made the host wait, by operation, counted when it ends.

    With ``inverses`` it divides by numbers as CUDA does: in the last bit, results are then not those of a CPU.
    """
    global _inverses
    before, _inverses = waits.copy(), inverses
    found: Counter[str] = Counter()
    try:
        with _Made(), sdpa_kernel(SDPBackend.MATH):
            yield found
    finally:
        _inverses = False
    found.update(waits - before)
