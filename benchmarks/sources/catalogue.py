"""What a suite downloads: the entries of its `sources.yaml`, one a file."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from benchmarks.runtime import manifest
from benchmarks.runtime.text import read_yaml
from benchmarks.sources import archive
from benchmarks.sources.archive import Mismatch
from benchmarks.suite import discover
from benchmarks.suite.fields import read

_HEXADECIMAL = {"sha256": 64, "md5": 32}


@dataclass(frozen=True)
class Source:
    """A file to download.

    ``file`` is its name under ``downloads/``, ``urls`` are where it comes from, tried in turn; ``page`` tells of it.
    ``sha256``, ``md5`` and ``bytes`` are what someone publishes of it; where no one publishes a SHA-256, the first copy
    decides. ``member`` ends the name of the one member that an archive is fetched for. ``gated`` says what to do where
    the host asks for an account.
    """

    file: str
    urls: tuple[str, ...]
    page: str
    licence: str
    sha256: str | None = None
    md5: str | None = None
    bytes: int | None = None
    member: str | None = None
    gated: str | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w-][\w.-]*", self.file, re.ASCII) or self.file.endswith((".part", ".bad")):
            raise ValueError(f"file is {self.file!r}: it must be a plain file name, without folders")
        if not self.urls or not all(re.match(r"https?://[^/\s]+/\S+$", url) for url in self.urls):
            raise ValueError(f"urls of {self.file} is {list(self.urls)}: give at least one, each http:// or https://")
        for name, digits in _HEXADECIMAL.items():
            value = getattr(self, name)
            if value is not None and not re.fullmatch(f"[0-9a-f]{{{digits}}}", value):
                raise ValueError(f"{name} of {self.file} is {value!r}: it must have {digits} digits from 0 to f")
        if self.bytes is not None and self.bytes < 1:
            raise ValueError(f"bytes of {self.file} is {self.bytes}, but must be at least 1")


def parse(document: object, where: str) -> dict[str, Source]:
    """The sources of a parsed `sources.yaml`; ``where`` names it in errors.

    Raises ValueError for unknown or missing keys (with the nearest name), values of a wrong type or form, and two
    sources of the same file name.
    """
    if not isinstance(document, dict) or not document:
        raise ValueError(f"{where} must be a mapping of names to sources")
    sources = {name: read(Source, entry, f"{where}: {name}") for name, entry in document.items()}
    owners: dict[str, str] = {}
    for name, source in sources.items():
        if source.file in owners:
            raise ValueError(f"{where}: {owners[source.file]} and {name} are both {source.file}: rename one")
        owners[source.file] = name
    return sources


def load(path: Path) -> dict[str, Source]:
    """Read the sources from a YAML file; raises ValueError if it is missing or no YAML, and as `parse` does."""
    if not path.is_file():
        raise ValueError(f"there is no {path} in {Path.cwd()}: only the paper suite downloads; give --suite paper")
    return parse(read_yaml(path), path.name)


def find(sources: dict[str, Source], name: str) -> Source:
    """The source of that name. Raises ValueError with the nearest name if there is none."""
    if name not in sources:
        raise discover.unknown("source", name, sources, "Sources stand in sources.yaml.")
    return sources[name]


def verify(path: Path, source: Source) -> str:
    """The SHA-256 of a file that is what ``source`` says; raises Mismatch for any other.

    Where no SHA-256 is known, an archive's own checksums are read: they find what was damaged on the way.
    """
    size = path.stat().st_size
    if not size:
        raise Mismatch("it is empty")
    if source.bytes not in (None, size):
        raise Mismatch(f"it has {size:,} bytes, not {source.bytes:,}")
    digest = manifest.sha256(path)
    if source.sha256 is not None:
        if digest != source.sha256:
            raise Mismatch(f"its SHA-256 is {digest}, not {source.sha256}")
        return digest
    if source.md5 is not None:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "md5").hexdigest()
        if found != source.md5:
            raise Mismatch(f"its MD5 is {found}, not {source.md5}")
    if fault := archive.fault(path, source.file, source.member):
        raise Mismatch(fault)
    return digest
