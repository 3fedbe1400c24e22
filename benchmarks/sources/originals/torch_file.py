"""The tensors of a file that torch.save wrote, in either of its formats, read one by one."""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from benchmarks.sources.archive import Mismatch
from benchmarks.sources.originals import unpickle
from benchmarks.sources.originals.unpickle import Storage, StoredTensor

# What the older format begins with.
MAGIC_NUMBER = 0x1950A86A20F9469CFC6C


class TorchFile:
    """The tensors in a file's ``state_dict``, or in the file itself where that is a dictionary of tensors.

    Attributes:
        tensors: by name, where each of them lies. The file is open as long as the context of `opened`.
    """

    def __init__(self, container: _Archive | _Sequence) -> None:
        content = container.content
        found = content.get("state_dict", content) if isinstance(content, dict) else {}
        named = found.items() if isinstance(found, dict) else ()
        self._container = container
        self.tensors = {name: tensor for name, tensor in named if isinstance(tensor, StoredTensor)}
        if not self.tensors or not all(isinstance(name, str) for name in self.tensors):
            raise Mismatch("it has no state_dict, a dictionary of named tensors")

    def read(self, name: str) -> Tensor:
        """A copy of the tensor of that name. Raises Mismatch if its numbers are damaged or not all there."""
        stored = self.tensors[name]
        storage = stored.storage
        if not math.prod(stored.shape):
            return torch.empty(stored.shape, dtype=storage.dtype)
        last = stored.offset + sum((size - 1) * step for size, step in zip(stored.shape, stored.stride, strict=True))
        with _one_line():
            numbers = self._container.numbers(storage)
            if last >= storage.count or len(numbers) != storage.count * storage.dtype.itemsize:
                raise EOFError(f"{name} reaches beyond its numbers")
        flat = torch.frombuffer(numbers, dtype=storage.dtype)
        return flat.as_strided(stored.shape, stored.stride, stored.offset).clone()


@contextmanager
def opened(path: Path) -> Iterator[TorchFile]:
    """The file at ``path``, open to read tensors from.

    Raises ValueError if it is missing, and Mismatch if it is none of torch.save's, is damaged, or has no dictionary of
    tensors.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing: fetch it first")
    with path.open("rb") as file:
        start = file.read(2)
        file.seek(0)
        container = None
        if start == b"PK" or start[:1] == pickle.PROTO:
            with _one_line():
                container = _Archive(file) if start == b"PK" else _Sequence(file)
        if container is None or container.foreign:
            raise Mismatch("it is not a file of torch.save")
        yield TorchFile(container)


@contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of many kinds, since zipfile and pickle do not expect all that damage can do
        reason = " ".join(str(error).split())
        raise Mismatch(f"it is damaged or truncated ({reason})") from None


class _Archive:
    """The newer format: a zip archive with a pickle and each storage as an uncompressed member, each with its CRC.

    ``foreign`` says that it is another archive.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._zip = zipfile.ZipFile(file)
        names = self._zip.namelist()
        pickles = [name for name in names if name.endswith("/data.pkl")]
        self.foreign = not pickles
        if self.foreign:
            return
        self._folder = pickles[0].removesuffix("data.pkl")
        if f"{self._folder}byteorder" in names and self._member("byteorder") != b"little":
            raise ValueError("its numbers are big-endian")
        self.content, _ = unpickle.load(io.BytesIO(self._member("data.pkl")))

    def numbers(self, storage: Storage) -> bytearray:
        return self._member(f"data/{storage.key}")

    def _member(self, name: str) -> bytearray:
        """A member's bytes, checked against its CRC."""
        member = self._zip.getinfo(self._folder + name)
        if member.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{name} is compressed, as torch.save leaves none")
        return bytearray(self._zip.read(member))


class _Sequence:
    """The older format: pickles of a number, a protocol, facts of the machine, the content and the storages' names in
    order; then the storages, each after its count of numbers.

    ``foreign`` says that it begins with another pickle.
    """

    def __init__(self, file: BinaryIO) -> None:
        number, _ = unpickle.load(file)
        self.foreign = number != MAGIC_NUMBER
        if self.foreign:
            return
        unpickle.load(file)
        machine, _ = unpickle.load(file)
        if not isinstance(machine, dict) or machine.get("little_endian") is not True:
            raise ValueError("its numbers are big-endian")
        self.content, storages = unpickle.load(file)
        order, _ = unpickle.load(file)
        self._file, self._places = file, {}
        place = file.tell()
        for key in order:
            self._places[key] = place
            place += 8 + storages[key].count * storages[key].dtype.itemsize
        if place != file.seek(0, io.SEEK_END):
            raise EOFError(f"it has {file.tell()} bytes and needs {place}")

    def numbers(self, storage: Storage) -> bytearray:
        self._file.seek(self._places[storage.key])
        (count,) = struct.unpack("<q", self._file.read(8))
        if count != storage.count:
            raise ValueError(f"storage {storage.key} has {count} numbers and needs {storage.count}")
        return bytearray(self._file.read(count * storage.dtype.itemsize))
