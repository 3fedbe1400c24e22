"""fetch: a file of `sources.yaml` comes into `downloads/`, from its addresses or the user's own copy, and is checked.

Where no one publishes a file's SHA-256, that of the first copy goes into `fetched.json`; all later ones must have it.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.sources import catalogue, download
from benchmarks.sources.archive import Mismatch
from benchmarks.sources.catalogue import Source
from benchmarks.suite.fields import read

SOURCES = Path("sources.yaml")
FETCHED = Path("fetched.json")
DOWNLOADS = Path("downloads")


@dataclass(frozen=True)
class Fetched:
    """What the first copy of a file was, and where it came from."""

    file: str
    bytes: int
    sha256: str
    origin: str


def run(name: str, path: Path | None = None) -> Path:
    """Download the source of that name, or take the user's own copy at ``path``; returns the file, which is checked.

    A download that was stopped is continued; one that is there already is only checked. Raises ValueError with the
    nearest name for an unknown source, and in one line that says what to do where `benchmarks.sources.download` does.
    """
    source = catalogue.find(catalogue.load(SOURCES), name)
    record = fetched().get(name)
    known = _with_record(name, source, record)
    target = DOWNLOADS / source.file
    try:
        digest, origin = _get(name, known, path, target)
    except ValueError as error:
        if known is not source and any(text in str(error) for text in (known.sha256, f"not {known.bytes:,}")):
            only = "remove its entry only if that was a wrong one, or the file was replaced for good"
            raise ValueError(f"{error} ({FETCHED} has those of the first copy: {only})") from None
        raise
    size = target.stat().st_size
    if source.sha256 is not None:
        said = "as published"
    elif record is not None:
        said = f"as recorded in {FETCHED} at the first fetch"
    else:
        _record(name, Fetched(source.file, size, digest, origin))
        said = f"which no one publishes: recorded in {FETCHED} now, and checked from now on"
        said = f"{said}; its MD5 is as published" if source.md5 else said
    print(f"{name}: {target}, {size:,} bytes, SHA-256 {digest}, {said}")
    return target


def checked(name: str) -> tuple[Path, Source]:
    """The fetched file of a source, with the source, for those who read it: its bytes and hashes are right.

    Raises ValueError, saying what to run, if it is missing or another file.
    """
    source = catalogue.find(catalogue.load(SOURCES), name)
    path = DOWNLOADS / source.file
    if not path.is_file():
        raise ValueError(f"{path} is missing: {_again(name)}")
    try:
        catalogue.verify(path, _with_record(name, source, fetched().get(name)))
    except Mismatch as reason:
        raise ValueError(f"{path} is not {name}: {reason}: delete it and {_again(name)}") from None
    return path, source


def unfit(name: str, path: Path, reason: Mismatch) -> ValueError:
    """The error for a fetched file that has the right hashes, as far as any are known, and cannot be used all the same.

    The first copy was a wrong one then, and what was recorded of it has to go too.
    """
    entry = f" and its entry in {FETCHED}" if name in fetched() else ""
    return ValueError(f"{path} is not {name}: {reason}: delete it{entry} and {_again(name)}")


def _again(name: str) -> str:
    return f"run `python -m benchmarks fetch --source {name}` in the suite's folder"


def fetched() -> dict[str, Fetched]:
    """The first copies of files without a published SHA-256. Raises ValueError if `fetched.json` is damaged."""
    if not FETCHED.exists():
        return {}
    try:
        return {name: read(Fetched, entry, name) for name, entry in json.loads(FETCHED.read_text("utf-8")).items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{FETCHED} is damaged ({error}): restore it from git, or delete it to record anew") from None


def _get(name: str, source: Source, path: Path | None, target: Path) -> tuple[str, str]:
    """Bring a source to ``target``; returns its SHA-256 and where it came from."""
    if path is not None:
        return download.take(name, source, path, target), f"the user's own {path.name}"
    if not target.exists():
        return download.fetch(name, source, target)
    try:
        return catalogue.verify(target, source), "a file that was there"
    except Mismatch as reason:
        bad = download.set_aside(target, target)
        raise ValueError(f"{target} has changed: {reason}; kept as {bad}, run again to fetch it anew") from None


def _with_record(name: str, source: Source, record: Fetched | None) -> Source:
    if source.sha256 is not None or record is None:
        return source
    if record.file != source.file:
        raise ValueError(f"{FETCHED} knows {name} as {record.file}, not {source.file}: remove its entry to record anew")
    return dataclasses.replace(source, sha256=record.sha256, bytes=record.bytes)


def _record(name: str, entry: Fetched) -> None:
    from benchmarks.runtime import files

    with _alone(DOWNLOADS):
        entries = fetched() | {name: entry}
        files.write_json(FETCHED, {key: dataclasses.asdict(entries[key]) for key in sorted(entries)})


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait for other processes that record something."""
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
