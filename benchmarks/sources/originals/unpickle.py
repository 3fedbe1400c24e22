"""Read a pickle of torch.save without running anything that it names.

Published checkpoints hold callbacks and configuration objects beside their weights, and a pickle can name any function
for its reader to call. Here every name becomes a stand-in that does nothing, except the few from which torch rebuilds
tensors; these only note where a tensor's numbers lie (`benchmarks.sources.originals.torch_file` reads them).
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import BinaryIO

import torch

DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# They ask the process for registered names, or for memory before there is anything to fill it with.
REFUSED = (pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER)


class StandIn:
    """In the place of what a pickle names: can be made, called, filled and given a state, and does nothing."""

    def __new__(cls: object, *arguments: object, **named: object) -> StandIn:
        return object.__new__(cls if isinstance(cls, type) else StandIn)

    # A pickle may call these on an object or on the class.
    def _nothing(*arguments: object, **named: object) -> None:
        pass

    def __call__(*arguments: object, **named: object) -> StandIn:
        return StandIn()

    __init__ = __setstate__ = __setitem__ = append = extend = add = _nothing


class Dictionary(dict):
    """In the place of an OrderedDict: keeps the items, drops the attributes that one may carry."""

    def __setstate__(*arguments: object) -> None:
        pass


@dataclass(frozen=True, eq=False)
class Storage(StandIn):
    """``count`` numbers of a file, under the name ``key``; tensors are views of them."""

    key: str
    dtype: torch.dtype
    count: int


@dataclass(frozen=True, eq=False)
class StoredTensor(StandIn):
    """Where a tensor's numbers lie: in which storage, from which number on, and how far apart along each axis."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype


class _RebuildTensor(StandIn):
    def __call__(self, storage: object, offset: int, shape: tuple, stride: tuple, *rest: object) -> StandIn:
        if not isinstance(storage, Storage):
            return StandIn()
        counts = [offset, *shape, *stride]
        if len(shape) != len(stride) or not all(type(count) is int and count >= 0 for count in counts):
            raise pickle.UnpicklingError(f"a tensor has offset {offset}, shape {shape} and stride {stride}")
        return StoredTensor(storage, offset, tuple(shape), tuple(stride))


class _RebuildParameter(StandIn):
    def __call__(self, tensor: object, *rest: object) -> object:
        return tensor


class _RebuildFromType(StandIn):
    def __call__(self, rebuild: object, kind: object, arguments: tuple, *rest: object) -> object:
        return rebuild(*arguments)


REBUILD = {
    ("torch._utils", "_rebuild_tensor"): _RebuildTensor,
    ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor,
    ("torch._utils", "_rebuild_parameter"): _RebuildParameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _RebuildParameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _RebuildFromType,
}


# The C implementation keeps numbered objects in an array: ten bytes can ask for all memory. This one keeps a dict.
class _Unpickler(pickle._Unpickler):
    dispatch = {code: load for code, load in pickle._Unpickler.dispatch.items() if bytes([code]) not in REFUSED}

    def find_class(self, module: str, name: str) -> object:
        if (module, name) == ("collections", "OrderedDict"):
            return Dictionary
        if (module, name) in REBUILD:
            return REBUILD[module, name]()
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        return StandIn

    def persistent_load(self, reference: object) -> StandIn:
        match reference:
            case ("storage", torch.dtype() as dtype, str() as key, _, int() as count, *view) if not any(view):
                return self.storages.setdefault(key, Storage(key, dtype, count))
        return StandIn()


def load(file: BinaryIO) -> tuple[object, dict[str, Storage]]:
    """The next pickle of ``file`` and the storages that it refers to, by name.

    Tensors are StoredTensors, and all else that the pickle names StandIns. Raises pickle.UnpicklingError, whatever goes
    wrong.
    """
    unpickler = _Unpickler(file, encoding="utf-8", errors="replace")
    unpickler.storages = {}
    try:
        return unpickler.load(), unpickler.storages
    except Exception as error:
        raise pickle.UnpicklingError(f"{type(error).__name__}: {error}".removesuffix(": ")) from None
