"""Tensors come out of files of torch.save, and nothing that such a file names is ever run."""

from __future__ import annotations

import builtins
import copyreg
import importlib
import io
import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from benchmarks.sources.archive import Mismatch
from benchmarks.sources.originals import torch_file, unpickle
from tests.benchmarks.sources.originals import tiny

FORMATS = {"archive": True, "sequence": False}


def write(path: Path, content: object, archive: bool = True) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=archive)
    return path


def read(path: Path) -> dict[str, torch.Tensor]:
    with torch_file.opened(path) as file:
        return {name: file.read(name) for name in file.tensors}


def weights() -> OrderedDict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(4, 6, generator=generator)
    found = {
        "plain": torch.randn(2, 3, 4, generator=generator),
        "scalar": torch.tensor(0.25),
        "empty": torch.zeros(0, 3),
        "half": torch.randn(5, generator=generator).half(),
        "brain": torch.randn(5, generator=generator).bfloat16(),
        "integers": torch.arange(7),
        "flags": torch.tensor([True, False]),
        "slice": base[1:3, ::2],
        "transposed": base.T,
        "parameter": torch.nn.Parameter(torch.randn(3, generator=generator)),
    }
    return OrderedDict(found)


@pytest.mark.parametrize("archive", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("wrap", [lambda found: found, lambda found: {"state_dict": found, "epoch": 3}, dict])
def test_tensors_are_those_that_torch_reads(wrap, archive, tmp_path):
    found = weights()
    read_back = read(write(tmp_path / "a.ckpt", wrap(found), archive))
    assert read_back.keys() == found.keys()
    for name, tensor in found.items():
        assert read_back[name].dtype == tensor.dtype and torch.equal(read_back[name], tensor.detach())


@pytest.mark.parametrize("archive", FORMATS.values(), ids=FORMATS)
def test_a_module_whose_tensors_share_numbers_is_read(archive, tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    module[1].weight = torch.nn.Parameter(module[0].weight[0])
    read_back = read(write(tmp_path / "a.ckpt", {"state_dict": module.state_dict()}, archive))
    assert all(torch.equal(tensor, read_back[name]) for name, tensor in module.state_dict().items())


def test_a_lightning_file_is_read_though_its_classes_are_gone(tmp_path):
    found = weights()
    with (tmp_path / "a.ckpt").open("wb") as file:
        tiny.save_lightning(found, file)
    with pytest.raises((ModuleNotFoundError, pickle.UnpicklingError)):
        torch.load(tmp_path / "a.ckpt", weights_only=False)
    read_back = read(tmp_path / "a.ckpt")
    assert all(torch.equal(tensor, read_back[name]) for name, tensor in found.items())


class Call:
    """Pickled, asks its reader to call a function."""

    def __init__(self, function: object, *arguments: object, state: object = None) -> None:
        self.reduced = (function, arguments, state) if state is not None else (function, arguments)

    def __reduce__(self) -> tuple:
        return self.reduced

    def __call__(self) -> None:
        """Only what can be called is pickled as a function."""


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A path, and objects whose unpickling creates a file there, each in its own way."""
    path = tmp_path / "fired"
    (tmp_path / "canary_module.py").write_text(
        f"open({str(path)!r}, 'w').close()\n"
        "class Sleeper:\n"
        "    def __setstate__(self, state):\n"
        f"        open({str(path)!r}, 'w').close()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "canary_module", raising=False)
    module = importlib.import_module("canary_module")
    path.unlink()
    sleeper = module.Sleeper()
    sleeper.awake = True
    code = f"open({str(path)!r}, 'w').close()"
    calls = {
        "os.system": Call(os.system, f"touch {path}"),
        "eval": Call(builtins.eval, code),
        "exec": Call(builtins.exec, code),
        "open": Call(builtins.open, str(path), "w"),
        "subprocess": Call(subprocess.check_output, ["touch", str(path)]),
        "getattr": Call(builtins.getattr, Call(Path, str(path)), "touch"),
        "called": Call(Call(builtins.getattr, Call(Path, str(path)), "touch")),
        "map": Call(list, Call(map, builtins.eval, [code])),
        "copyreg": Call(copyreg._reconstructor, module.Sleeper, object, None, state={"awake": True}),
        "__setstate__": sleeper,
        "imported": module.Sleeper,
        "torch": Call(torch._tensor._rebuild_from_type_v2, builtins.eval, object, (code,), {}),
        "parameter": Call(torch._utils._rebuild_parameter, Call(builtins.eval, code), False, OrderedDict()),
    }
    yield path, calls
    sys.modules.pop("canary_module", None)


NAMES = (
    *("os.system", "eval", "exec", "open", "subprocess", "getattr", "called", "map"),
    *("copyreg", "__setstate__", "imported", "torch", "parameter"),
)


@pytest.mark.parametrize("archive", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("name", NAMES)
def test_what_a_pickle_names_is_never_run(name, archive, canary, tmp_path):
    path, calls = canary
    assert set(calls) == set(NAMES)
    tensor = torch.arange(3.0)
    poisoned = OrderedDict({"weight": tensor, "poison": calls[name]})
    poisoned._metadata = calls[name]
    file = write(
        tmp_path / "a.ckpt", {"callbacks": [calls[name]], "state_dict": poisoned, "last": calls[name]}, archive
    )
    del sys.modules["canary_module"]
    path.unlink(missing_ok=True)
    found = read(file)
    assert list(found) == ["weight"] and torch.equal(found["weight"], tensor)
    assert not path.exists() and "canary_module" not in sys.modules


@pytest.mark.parametrize("name", NAMES)
def test_the_canaries_are_alive(name, canary, tmp_path):
    path, calls = canary
    write(tmp_path / "a.ckpt", calls[name])
    del sys.modules["canary_module"]
    path.unlink(missing_ok=True)
    try:
        loaded = torch.load(tmp_path / "a.ckpt", weights_only=False)
        if name == "getattr":
            loaded()
    except (TypeError, AttributeError):  # from what comes after the call
        pass
    assert path.exists()


def pickled(*operations: bytes) -> bytes:
    return b"\x80\x02" + b"".join(operations) + b"."


HOSTILE = {
    "a registered name": b"\x82\x01",
    "an object number that asks for 34 GB": b"N" + pickle.LONG_BINPUT + b"\xff\xff\xff\xff" + pickle.BINGET + b"\x07",
    "a byte array of 8 EB": pickle.BYTEARRAY8 + b"\xff" * 7 + b"\x7f",
    "a string of 2 GB": pickle.BINUNICODE + b"\xff\xff\xff\x7f",
    "an operation that is none": b"\xff",
    "nothing": b"",
    "a state of what has none": b"}}" + pickle.BUILD,
    "a tensor without storage": b"ctorch._utils\n_rebuild_tensor_v2\n(NK\x00K\x01\x85K\x01\x85tR",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused_in_one_line(name, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.ckpt", "w") as archive:
        archive.writestr("archive/data.pkl", pickled(HOSTILE[name]))
    with pytest.raises(Mismatch, match="it (is damaged or truncated|has no state_dict)") as error:
        read(tmp_path / "a.ckpt")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_name_in_the_registry_of_extensions_is_no_way_in():
    copyreg.add_extension("os", "system", 0x123)
    try:
        with pytest.raises(pickle.UnpicklingError):
            unpickle.load(io.BytesIO(pickled(b"\x83\x23\x01(X\x02\x00\x00\x00lstR")))
    finally:
        copyreg.remove_extension("os", "system", 0x123)


def test_a_state_cannot_change_the_reader():
    state = b"N}(X\x08\x00\x00\x00__call__NX\x05\x00\x00\x00shapeNu\x86b"
    for function in (b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n", b"cos\nsystem\n"):
        before = {name: dict(vars(kind)) for name, kind in vars(unpickle).items() if isinstance(kind, type)}
        unpickle.load(io.BytesIO(pickled(function, state)))
        assert before == {name: dict(vars(kind)) for name, kind in vars(unpickle).items() if isinstance(kind, type)}


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        ((5, (2, 2), (2, 1)), "reaches beyond"),
        ((0, (3, 3), (3, 1)), "reaches beyond"),
        ((-1, (2, 2), (2, 1)), "has offset -1"),
        ((0, (2, 2), (1,)), "shape"),
    ],
)
def test_a_tensor_outside_its_storage_is_refused(tensor, reason, tmp_path):
    offset, shape, stride = tensor
    storage = torch.arange(8.0)._typed_storage()
    call = Call(torch._utils._rebuild_tensor_v2, storage, offset, shape, stride, False, OrderedDict())
    path = write(tmp_path / "a.ckpt", {"state_dict": {"weight": call}})
    with pytest.raises(Mismatch, match=f"it is damaged or truncated .*{reason}"):
        read(path)


@pytest.mark.parametrize("archive", FORMATS.values(), ids=FORMATS)
def test_every_truncation_is_found(archive, tmp_path):
    path = write(tmp_path / "a.ckpt", {"state_dict": {"weight": torch.arange(100.0), "bias": torch.ones(3)}}, archive)
    data = path.read_bytes()
    for length in [*range(1, 40), *range(40, len(data), 37), len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(Mismatch, match="it is (damaged or truncated|not a file of torch.save)") as error:
            read(path)
        assert "\n" not in str(error.value)


def test_every_flipped_byte_of_an_archive_is_found_or_harmless(tmp_path):
    found = {"weight": torch.arange(20.0), "bias": torch.ones(3)}
    path = write(tmp_path / "a.ckpt", {"state_dict": found})
    data = path.read_bytes()
    refused = 0
    for place in range(0, len(data), 3):
        flipped = bytearray(data)
        flipped[place] ^= 0x10
        path.write_bytes(flipped)
        try:
            read_back = read(path)
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error)
        else:
            assert all(torch.equal(read_back[name], tensor) for name, tensor in found.items())
    assert refused > 100


def test_a_flipped_bit_of_a_weight_is_named(tmp_path):
    path = write(tmp_path / "a.ckpt", {"state_dict": {"weight": torch.full((1000,), 1.5)}})
    data = bytearray(path.read_bytes())
    data[data.index(torch.full((10,), 1.5).numpy().tobytes()) + 400] ^= 1
    path.write_bytes(data)
    with pytest.raises(Mismatch, match=r"it is damaged or truncated \(Bad CRC-32"):
        read(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"<!DOCTYPE html><html>", b"\x08\x00\x00\x00\x00\x00\x00\x00{}", pickle.dumps({"state_dict": {}}, 2)],
)
def test_other_files_are_refused(content, tmp_path):
    path = tmp_path / "a.ckpt"
    path.write_bytes(content)
    with pytest.raises(Mismatch, match="it is not a file of torch.save"):
        read(path)


def test_other_archives_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.ckpt", "w") as archive:
        archive.writestr("readme.txt", "nothing")
    with pytest.raises(Mismatch, match="it is not a file of torch.save"):
        read(tmp_path / "a.ckpt")


def test_a_compressed_member_is_refused(tmp_path):
    path = write(tmp_path / "a.ckpt", {"state_dict": {"weight": torch.zeros(10)}})
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tmp_path / "b.ckpt", "w", zipfile.ZIP_DEFLATED) as other:
        for name in archive.namelist():
            other.writestr(name, archive.read(name))
    with pytest.raises(Mismatch, match="it is damaged or truncated .*is compressed"):
        read(tmp_path / "b.ckpt")


@pytest.mark.parametrize("archive", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize(
    "content", [{"epoch": 3}, [torch.ones(2)], torch.ones(2), {"state_dict": {"a": 3}}, {3: torch.ones(2)}]
)
def test_a_file_without_named_tensors_is_refused(content, archive, tmp_path):
    with pytest.raises(Mismatch, match="it has no state_dict, a dictionary of named tensors"):
        read(write(tmp_path / "a.ckpt", content, archive))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="a.ckpt is missing: fetch it first"), torch_file.opened(tmp_path / "a.ckpt"):
        pass
