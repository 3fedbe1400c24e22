"""Take one member out of a zip archive that nobody vouches for, and check an archive by its own checksums."""

from __future__ import annotations

import os
import zipfile
import zlib
from pathlib import Path

from benchmarks.sources import disk

# What files of torch.save begin with: they are archives, or in its older format pickles.
_SAVED = (b"PK", b"\x80\x02")
_CHUNK = 1 << 20
# What zipfile raises for archives that are cut, altered, encrypted or compressed in another way.
_DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError)


class Mismatch(ValueError):
    """A file is not the one that is meant; the text says in what it differs."""


def extract_member(archive: Path, suffix: str, to: Path) -> None:
    """Unpack the only member of a zip archive whose name ends with ``suffix`` as the file ``to``.

    The member's own path plays no part in where it goes. If it fails, ``to`` is as before. Raises Mismatch if none or
    several members match or if the archive is damaged, and ValueError if it is missing or the disk has no room.
    """
    if not archive.is_file():
        raise ValueError(f"there is no {archive}: fetch it first")
    to.parent.mkdir(parents=True, exist_ok=True)
    temporary = to.with_name(f".{to.name}.{os.getpid()}")
    try:
        with zipfile.ZipFile(archive) as opened:
            member = _only_member(opened, suffix)
            disk.check(to.parent, member.file_size)
            with opened.open(member) as source, temporary.open("wb", buffering=0) as file:
                while chunk := source.read(_CHUNK):
                    disk.write(file, chunk)
                os.fsync(file.fileno())
        temporary.replace(to)
    except LookupError as error:
        raise Mismatch(f"it {error}") from None
    except _DAMAGED as error:
        raise Mismatch(f"it is not a zip archive, or damaged ({error})") from None
    finally:
        temporary.unlink(missing_ok=True)


def fault(path: Path, name: str, member: str | None) -> str | None:
    """What is wrong with a file by its own checksums; None if nothing is, or if it is no archive and need not be.

    An archive is needed where ``member`` is to be taken out of it, or where ``name``, the file's, or its first bytes
    say that it is one. A checkpoint has to begin as one.
    """
    with path.open("rb") as file:
        start = file.read(2)
    if not zipfile.is_zipfile(path):
        if member is not None or name.endswith((".zip", ".npz")) or start == b"PK":
            return "it is not a zip archive, or not all of it"
        return "it is not a checkpoint of torch.save" if name.endswith(".ckpt") and start not in _SAVED else None
    try:
        with zipfile.ZipFile(path) as archive:
            if member is not None:
                _only_member(archive, member)
            damaged = archive.testzip()
    except LookupError as error:
        return f"it {error}"
    except _DAMAGED as error:
        return f"it is a damaged archive ({error})"
    return f"it is a damaged archive (the checksum of {damaged} is wrong)" if damaged else None


def _only_member(archive: zipfile.ZipFile, suffix: str) -> zipfile.ZipInfo:
    """The member that ends with ``suffix``, companions that macOS adds aside; LookupError unless there is just one."""
    members = [item for item in archive.infolist() if not item.is_dir() and not item.filename.startswith("__MACOSX/")]
    found = [item for item in members if item.filename.endswith(suffix)]
    if len(found) == 1:
        return found[0]
    if found:
        raise LookupError(f"has several members that end with {suffix}: {_names(found)}")
    raise LookupError(f"has no member that ends with {suffix}, but has {_names(members) or 'none at all'}")


def _names(members: list[zipfile.ZipInfo]) -> str:
    return ", ".join(item.filename for item in members[:5]) + (", ..." if len(members) > 5 else "")
