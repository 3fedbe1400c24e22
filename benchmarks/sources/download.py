"""Download large files so that a run that stops goes on where it stopped, and trust none before it is checked.

A download lies in ``<file>.part`` and takes its final name when its bytes and hashes are right.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from urllib.parse import urlsplit

import requests
from tqdm import tqdm

from benchmarks.sources import disk
from benchmarks.sources.archive import Mismatch
from benchmarks.sources.catalogue import Source, verify

CHUNK = 1 << 16
TIMEOUT = (20, 60)  # seconds to connect, and without a byte
# Seconds before each further try of what gave nothing new; what gives something may stop any number of times.
WAITS = (1, 2, 4, 8)
TOKEN, TOKEN_HOST = "HF_TOKEN", "huggingface.co"


class _Refused(Exception):
    """One address cannot give the file; another one may."""


class _Denied(_Refused):
    """One address gives the file only to those who may have it."""


class _Interrupted(Exception):
    """A transfer stopped; another try may go on with it."""


def fetch(name: str, source: Source, target: Path) -> tuple[str, str]:
    """Download a source to ``target`` and check it; returns its SHA-256 and the address that gave it.

    The addresses are tried in turn. What an earlier run left in ``<target>.part`` is continued where the server says
    that its file is still the same, or where a known SHA-256 will tell. A file that turns out wrong is kept as
    ``<target>.bad``. Raises ValueError in one line that names each address with its reason, if no address gives the
    file; if the disk has no room for it; or if another process is downloading it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    reasons, denied = [], False
    for url in source.urls:
        with _exclusive(part) as file:
            try:
                _transfer(url, source, part, file)
                os.fsync(file.fileno())
                digest = verify(part, source)
            except _Refused as reason:
                reasons.append(f"{url}: {reason}")
                denied = denied or isinstance(reason, _Denied)
                continue
            except Mismatch as reason:
                reasons.append(f"{url}: {reason}; kept as {set_aside(part, target)}")
                continue
            finally:
                if not _size(file):
                    part.unlink(missing_ok=True)
                if not part.exists():
                    _state_file(part).unlink(missing_ok=True)
            _state_file(part).unlink(missing_ok=True)
            part.replace(target)
            return digest, url
    again = disk.AGAIN if part.exists() else "run again, which begins anew"
    advice = f"{again}, or find {source.file} ({source.page} says more) and give its path with --file"
    raise ValueError(
        f"{name} could not be fetched ({'; '.join(reasons)}): {source.gated if denied and source.gated else advice}"
    )


def take(name: str, source: Source, path: Path, target: Path) -> str:
    """Make the user's own copy of a source ``target``, by a hard link or a copy, and check it; returns its SHA-256.

    Raises ValueError if it is missing or not the file that is meant; then nothing changes.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}: give the path of your copy of {source.file}")
    target.parent.mkdir(parents=True, exist_ok=True)
    disk.sweep(target)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        try:
            os.link(path.resolve(), temporary)
        except OSError:
            disk.check(temporary.parent, path.stat().st_size)
            shutil.copyfile(path, temporary)
        digest = verify(temporary, source)
        temporary.replace(target)
    except Mismatch as reason:
        advice = f"give the file of {source.urls[0]}, unchanged"
        if source.member and source.sha256 is None:
            advice += f", or pack what you have of it: `zip -0 {source.file} {source.member}`"
        raise ValueError(f"{path} is not {name}: {reason}; {advice}") from None
    finally:
        temporary.unlink(missing_ok=True)
    return digest


def set_aside(path: Path, target: Path) -> Path:
    """Rename a wrong file to ``<target>.bad``, so that the next run begins anew; returns the new path."""
    bad = target.with_name(f"{target.name}.bad")
    path.replace(bad)
    return bad


@contextmanager
def _exclusive(part: Path) -> Iterator[FileIO]:
    """The file to append to, unbuffered, so that all that came is on disk; no other process may write it."""
    with part.open("ab", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is downloading {part}: wait for it to end") from None
        yield file


def _transfer(url: str, source: Source, part: Path, file: FileIO) -> None:
    most, tries = _size(file), 0
    while True:
        try:
            return _request(url, source, part, file)
        except (requests.RequestException, _Interrupted) as error:
            tries = 0 if _size(file) > most else tries + 1
            most = max(most, _size(file))
            if tries > len(WAITS) or isinstance(error, requests.exceptions.SSLError | requests.TooManyRedirects):
                raise _Refused(_reason(error)) from None
            time.sleep(WAITS[max(tries - 1, 0)])


def _request(url: str, source: Source, part: Path, file: FileIO) -> None:
    """One request: append to ``file`` what it lacks, or write all of it anew."""
    have, state = _size(file), _read_state(part, url)
    if have and have == (source.bytes or state.get("bytes")):
        return  # stopped between the last byte and the check
    validator = state.get("validator")
    if validator is None and source.sha256 is None:
        have = 0  # nothing could tell whether the rest belongs to what is there
    headers = {"Accept-Encoding": "identity", "User-Agent": "tfmq-bench"} | _authorisation(url)
    if have:
        headers |= {"Range": f"bytes={have}-"} | ({"If-Range": validator} if validator else {})
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        _check_answer(response)
        have, total = _continues(response, have, validator, file)
        if None not in (source.bytes, total) and total != source.bytes:
            raise _Refused(f"it has {total:,} bytes there, not {source.bytes:,}")
        if total is not None:
            disk.check(part.parent, total - have)
        file.truncate(have)
        state = {"url": url, "validator": _validator(response), "bytes": total}
        with _state_file(part).open("wb", buffering=0) as state_file:
            disk.write(state_file, json.dumps(state).encode())
        with tqdm(desc=source.file, initial=have, total=total, unit="B", unit_scale=True, disable=None) as progress:
            for chunk in response.iter_content(CHUNK):
                disk.write(file, chunk)
                progress.update(len(chunk))
    if total is not None and _size(file) != total:
        raise _Interrupted(f"the connection drops at {_size(file):,} of {total:,} bytes")


def _check_answer(response: requests.Response) -> None:
    code = response.status_code
    if code in (401, 403):
        raise _Denied(f"{code}, access is refused")
    if code in (404, 410):
        raise _Refused(f"{code}, it is not there")
    if code == 429 or code >= 500:
        raise _Interrupted(f"the server answers {code}")
    if code not in (200, 206, 416):
        raise _Refused(f"the server answers {code}")
    if response.headers.get("Content-Type", "").startswith("text/html"):
        raise _Refused("the server answers with a web page in place of the file")


def _continues(response: requests.Response, have: int, validator: str | None, file: FileIO) -> tuple[int, int | None]:
    """From which byte on the answer goes, and the size of the whole file if it says so.

    A server that does not do ranges, or whose file has changed, gives all of it. If it gives another range or refuses
    ours, what is there is no part of its file: that is thrown away, and the transfer counts as interrupted.
    """
    if response.status_code == 200:
        length = response.headers.get("Content-Length")
        return 0, int(length) if length else None
    found = re.match(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
    same = validator is None or _validator(response) in (None, validator)
    if response.status_code == 206 and found and int(found[1]) == have and same:
        return have, int(found[2])
    file.truncate(0)
    raise _Interrupted("the file there has changed")


def _reason(error: Exception) -> str:
    if isinstance(error, _Interrupted):
        return str(error)
    if isinstance(error, requests.exceptions.SSLError):
        return "its certificate is not accepted"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "the connection drops again and again"
    if isinstance(error, requests.Timeout) or "timed out" in str(error):
        return "no answer in time"
    cause = getattr(error.args[0], "reason", error) if error.args else error
    return f"the host cannot be reached ({' '.join(str(cause).split()).rsplit(': ', 1)[-1]})"


def _authorisation(url: str) -> dict[str, str]:
    """The user's token for the one host that it is for; requests drops it when it is sent on to another host."""
    token, parts = os.environ.get(TOKEN), urlsplit(url)
    return (
        {"Authorization": f"Bearer {token}"} if token and (parts.scheme, parts.netloc) == ("https", TOKEN_HOST) else {}
    )


def _validator(response: requests.Response) -> str | None:
    """What tells this version of the file from another: a strong ETag, or else the date of its last change."""
    etag = response.headers.get("ETag")
    return etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified")


def _state_file(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _read_state(part: Path, url: str) -> dict:
    """Which version of the file at ``url`` the bytes in ``part`` are of; empty if they are of another address."""
    try:
        state = json.loads(_state_file(part).read_text(encoding="utf-8"))
        return state if state["url"] == url else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _size(file: FileIO) -> int:
    return os.fstat(file.fileno()).st_size
