import errno
import hashlib
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests

from benchmarks.sources import disk, download
from benchmarks.sources.catalogue import Source
from benchmarks.sources.download import fetch, take
from tests.benchmarks.archives import pack
from tests.benchmarks.loopback import Loopback

SIZE = 600_000
BODY = random.Random(0).randbytes(SIZE)
HASH = hashlib.sha256(BODY).hexdigest()
PIECE = download.CHUNK  # what a dropped connection may lose


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(download, "WAITS", (0, 0))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_TOKEN", raising=False)


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "model.bin").write_bytes(BODY)
    with Loopback(folder) as loopback:
        yield loopback


@pytest.fixture
def target(tmp_path):
    return tmp_path / "downloads" / "model.bin"


def source(*urls, **changes):
    return Source(**({"file": "model.bin", "urls": urls, "page": "here", "licence": "MIT", "sha256": HASH} | changes))


def left(target):
    return sorted(path.name for path in target.parent.iterdir())


class Waits(tuple):
    """Waiting times that do something when a transfer has stopped and is about to be taken up again."""

    def __new__(cls, do):
        waits = super().__new__(cls, (0, 0))
        waits.do = do
        return waits

    def __getitem__(self, index):
        self.do()
        return 0


def stop_after(server, target, count, **changes):
    """A first run that is stopped when it has got ``count`` bytes; returns the source."""
    stopped = source(server.url("model.bin"), **changes)
    server.drops[:] = [count]

    def stop():
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(download, "WAITS", Waits(stop))
        with pytest.raises(KeyboardInterrupt):
            fetch("model", stopped, target)
    return stopped


def test_a_file_comes_whole_and_leaves_nothing_else(server, target):
    assert fetch("model", source(server.url("model.bin")), target) == (HASH, server.url("model.bin"))
    assert target.read_bytes() == BODY
    assert left(target) == ["model.bin"]
    assert server.sent["model.bin"] == SIZE


@pytest.mark.parametrize("lengths", [True, False])
def test_a_dropped_connection_is_taken_up_again(server, target, lengths):
    server.lengths = lengths
    server.drops[:] = [200_000, 150_000, 1] if lengths else []
    fetch("model", source(server.url("model.bin")), target)
    assert target.read_bytes() == BODY
    assert server.sent["model.bin"] <= SIZE + 3 * PIECE


def test_connections_may_drop_any_number_of_times_while_something_comes(server, target):
    server.drops[:] = [PIECE + 1] * 7
    fetch("model", source(server.url("model.bin")), target)
    assert target.read_bytes() == BODY
    assert len(server.asked) == 8


def test_a_second_run_downloads_only_the_rest(server, target):
    again = stop_after(server, target, 400_000)
    there = (target.parent / "model.bin.part").stat().st_size
    assert 400_000 - PIECE <= there <= 400_000
    server.sent.clear()
    fetch("model", again, target)
    assert target.read_bytes() == BODY
    assert server.sent["model.bin"] == SIZE - there
    assert server.asked[-1][1]["If-Range"].startswith('"')
    assert left(target) == ["model.bin"]


def test_a_killed_run_is_continued(server, target):
    server.pause = 0.05
    code = (
        "import sys; from pathlib import Path; from benchmarks.sources.catalogue import Source;"
        " from benchmarks.sources.download import fetch;"
        " fetch('model', Source('model.bin', (sys.argv[1],), 'here', 'MIT'), Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, server.url("model.bin"), str(target)]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[3])
    part = target.parent / "model.bin.part"
    deadline = time.monotonic() + 120
    while not (part.exists() and part.stat().st_size > 150_000) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    there = part.stat().st_size
    assert 150_000 < there < SIZE
    server.pause = 0
    fetch("model", source(server.url("model.bin"), sha256=None), target)
    assert target.read_bytes() == BODY
    assert server.asked[-1][1]["Range"] == f"bytes={there}-"


def test_a_run_that_was_killed_before_the_check_downloads_nothing(server, target):
    again = stop_after(server, target, 400_000)
    (target.parent / "model.bin.part").write_bytes(BODY)
    server.sent.clear()
    fetch("model", again, target)
    assert server.sent["model.bin"] == 0
    assert target.read_bytes() == BODY


def test_a_server_without_ranges_gives_all_of_it_again(server, target):
    again = stop_after(server, target, 400_000)
    server.ranges = False
    fetch("model", again, target)
    assert target.read_bytes() == BODY


@pytest.mark.parametrize("known", [True, False])
def test_a_file_that_has_changed_since_is_not_put_together_from_two(server, target, known):
    new = BODY[::-1]
    digest = hashlib.sha256(new).hexdigest() if known else None
    again = stop_after(server, target, 400_000, sha256=digest)
    (server.folder / "model.bin").write_bytes(new)
    assert fetch("model", again, target)[0] == hashlib.sha256(new).hexdigest()
    assert target.read_bytes() == new


@pytest.mark.parametrize("known", [True, False])
def test_without_an_etag_a_file_is_continued_only_if_its_hash_will_tell(server, target, known):
    server.etags = False
    again = stop_after(server, target, 400_000, sha256=HASH if known else None)
    server.sent.clear()
    fetch("model", again, target)
    assert target.read_bytes() == BODY
    assert (server.sent["model.bin"] == SIZE) == (not known)


def test_what_is_left_of_a_larger_file_is_thrown_away(server, target):
    again = stop_after(server, target, 400_000)
    (target.parent / "model.bin.part").write_bytes(bytes(SIZE + 5))
    fetch("model", again, target)
    assert target.read_bytes() == BODY


def test_another_address_continues_what_the_first_began(server, target, monkeypatch):
    (server.folder / "mirror.bin").write_bytes(BODY)
    server.drops[:] = [400_000]
    monkeypatch.setattr(download, "WAITS", Waits(lambda: server.codes.update({"model.bin": 404})))
    digest, url = fetch("model", source(server.url("model.bin"), server.url("mirror.bin")), target)
    assert url == server.url("mirror.bin")
    assert target.read_bytes() == BODY
    assert server.sent["mirror.bin"] <= 200_000 + PIECE


def test_addresses_are_tried_in_turn_and_each_is_named_with_its_reason(server, target):
    server.codes |= {"gone.bin": 410, "busy.bin": 503, "odd.bin": 418}
    server.html.add("model.bin")
    (server.folder / "other.bin").write_bytes(BODY[:-1] + b"!")
    names = ["missing.bin", "gone.bin", "busy.bin", "odd.bin", "model.bin", "other.bin"]
    urls = [server.url(name) for name in names] + ["http://127.0.0.1:9/model.bin", "http://nowhere.invalid/model.bin"]
    with pytest.raises(ValueError) as caught:
        fetch("model", source(*urls), target)
    message = str(caught.value)
    assert "\n" not in message
    reasons = [
        "404, it is not there",
        "410, it is not there",
        "the server answers 503",
        "the server answers 418",
        "the server answers with a web page in place of the file",
        f"its SHA-256 is {hashlib.sha256(BODY[:-1] + b'!').hexdigest()}, not {HASH}; kept as {target}.bad",
        "the host cannot be reached (",
        "the host cannot be reached (",
    ]
    assert message.startswith("model could not be fetched (")
    for url, reason in zip(urls, reasons, strict=True):
        assert f"{url}: {reason}" in message
    assert message.endswith("or find model.bin (here says more) and give its path with --file")
    assert left(target) == ["model.bin.bad"]
    assert [name for name, _ in server.asked].count("busy.bin") == 1 + len(download.WAITS)


@pytest.mark.parametrize("code", [401, 403])
def test_a_gated_file_says_how_to_get_access(server, target, code):
    server.codes["model.bin"] = code
    with pytest.raises(ValueError, match=rf"{code}, access is refused\): ask the owner$"):
        fetch("model", source(server.url("model.bin"), gated="ask the owner"), target)
    with pytest.raises(ValueError, match=rf"{code}, access is refused\): run again"):
        fetch("model", source(server.url("model.bin")), target)
    assert left(target) == []


@pytest.mark.parametrize(("changes", "reason"), [({"bytes": SIZE + 1}, "it has 600,000 bytes there, not 600,001")])
def test_a_file_of_another_size_is_not_even_downloaded(server, target, changes, reason):
    with pytest.raises(ValueError, match=reason):
        fetch("model", source(server.url("model.bin"), **changes), target)
    assert left(target) == []


def test_a_truncated_file_is_noticed_where_the_server_does_not_say_its_size(server, target):
    server.lengths = False
    server.drops[:] = [400_000]
    with pytest.raises(ValueError, match=r"it has 400,000 bytes, not 600,000; kept as .*model.bin.bad"):
        fetch("model", source(server.url("model.bin"), bytes=SIZE), target)
    fetch("model", source(server.url("model.bin"), bytes=SIZE), target)
    assert target.read_bytes() == BODY


def test_a_flipped_bit_is_noticed_and_the_next_run_begins_anew(server, target):
    again = stop_after(server, target, 400_000)
    part = target.parent / "model.bin.part"
    damaged = bytearray(part.read_bytes())
    damaged[1000] ^= 1
    part.write_bytes(damaged)
    with pytest.raises(ValueError, match=rf"its SHA-256 is [0-9a-f]{{64}}, not {HASH}; kept as .*model.bin.bad"):
        fetch("model", again, target)
    assert left(target) == ["model.bin.bad"]
    fetch("model", again, target)
    assert target.read_bytes() == BODY


def test_a_published_md5_is_checked(server, target):
    right = hashlib.md5(BODY).hexdigest()
    assert fetch("model", source(server.url("model.bin"), sha256=None, md5=right), target)[0] == HASH
    target.unlink()
    with pytest.raises(ValueError, match=f"its MD5 is {right}, not {'0' * 32}"):
        fetch("model", source(server.url("model.bin"), sha256=None, md5="0" * 32), target)


def test_a_disk_that_is_too_small_is_noticed_before(server, target, monkeypatch):
    usage = disk.shutil.disk_usage(".")
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda folder: usage._replace(free=SIZE - 1))
    with pytest.raises(
        ValueError, match="600,000 bytes are needed in .*, but 599,999 are free: make room and run again"
    ):
        fetch("model", source(server.url("model.bin"), server.url("model.bin")), target)
    assert server.sent["model.bin"] <= SIZE  # what the socket had taken already
    assert len(server.asked) == 1
    assert left(target) == []


def test_a_disk_without_a_free_byte_leaves_nothing(server, target, monkeypatch):
    def full(data):
        raise OSError(errno.ENOSPC, "No space left on device")

    server.lengths = False
    real = disk.write
    monkeypatch.setattr(
        download.disk, "write", lambda file, data: real(SimpleNamespace(name=file.name, write=full), data)
    )
    with pytest.raises(ValueError, match="the disk of .*downloads is full: make room and run again"):
        fetch("model", source(server.url("model.bin")), target)
    assert left(target) == []


def test_a_disk_that_fills_up_keeps_what_came(server, target, monkeypatch):
    real = disk.write

    class Full:
        """A file on a disk of 300,000 bytes."""

        def __init__(self, file):
            self.file, self.name = file, file.name

        def write(self, data):
            if self.file.tell() + len(data) > 300_000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data)

    monkeypatch.setattr(download.disk, "write", lambda file, data: real(Full(file), data))
    with pytest.raises(ValueError, match="the disk of .*downloads is full: make room and run again"):
        fetch("model", source(server.url("model.bin")), target)
    there = (target.parent / "model.bin.part").stat().st_size
    assert 300_000 - PIECE <= there <= 300_000
    monkeypatch.setattr(download.disk, "write", real)
    fetch("model", source(server.url("model.bin")), target)
    assert target.read_bytes() == BODY
    assert server.asked[-1][1]["Range"] == f"bytes={there}-"


def test_two_processes_do_not_write_the_same_file(server, target):
    target.parent.mkdir()
    with download._exclusive(target.parent / "model.bin.part"), pytest.raises(ValueError, match="another process"):
        fetch("model", source(server.url("model.bin")), target)


def test_the_token_goes_to_its_own_host_only(server, target, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    fetch("model", source(server.url("model.bin")), target)
    assert all("Authorization" not in headers for _, headers in server.asked)
    seen = []
    monkeypatch.setattr(requests, "get", lambda url, headers, **settings: seen.append((url, headers)) or 1 / 0)
    for url in (
        "https://huggingface.co/a/resolve/main/b",
        "http://huggingface.co/a",
        "https://huggingface.co.evil.example/a",
        "https://evil.example/huggingface.co",
    ):
        with pytest.raises(ZeroDivisionError):
            fetch("other", source(url), target.with_name("other.bin"))
    assert [headers.get("Authorization") for _, headers in seen] == ["Bearer secret", None, None, None]


def test_a_copy_of_the_users_is_linked_and_checked(tmp_path, target):
    own = tmp_path / "mine.ckpt"
    own.write_bytes(BODY)
    assert take("model", source("http://host/model.bin"), own, target) == HASH
    assert target.samefile(own)
    assert take("model", source("http://host/model.bin"), target, target) == HASH
    assert left(target) == ["model.bin"]


def test_a_copy_on_another_disk_is_copied(tmp_path, target, monkeypatch):
    own = tmp_path / "mine.ckpt"
    own.write_bytes(BODY)

    def link(*arguments):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(download.os, "link", link)
    take("model", source("http://host/model.bin"), own, target)
    assert target.read_bytes() == BODY and not target.samefile(own)


def test_a_wrong_copy_of_the_users_changes_nothing(tmp_path, target):
    own = tmp_path / "mine.ckpt"
    own.write_bytes(BODY[:-1])
    with pytest.raises(
        ValueError, match=r"mine.ckpt is not model: its SHA-256 .*; give the file of http://host/model.bin"
    ):
        take("model", source("http://host/model.bin"), own, target)
    assert left(target) == [] and own.exists()
    with pytest.raises(ValueError, match="there is no file .*: give the path of your copy of model.bin"):
        take("model", source("http://host/model.bin"), tmp_path / "absent", target)


def test_an_archive_without_a_published_hash_is_read_against_its_own_checksums(server, target):
    path = pack(server.folder / "model.zip", **{"a/model.ckpt": BODY, "b.txt": b"b"})
    archive = source(server.url("model.zip"), file="model.zip", sha256=None, member="model.ckpt")
    zipped = target.with_name("model.zip")
    fetch("model", archive, zipped)
    good = path.read_bytes()
    for damaged, reason in (
        (good[:-100_000], "it is not a zip archive, or not all of it"),
        (good[:1000] + bytes([good[1000] ^ 1]) + good[1001:], "it is a damaged archive"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=reason):
            fetch("model", archive, zipped.with_name("again.zip"))
    pack(path, **{"archive/data.pkl": b"what torch saves is an archive too"})
    with pytest.raises(
        ValueError, match=r"has no member that ends with model.ckpt, but has archive/data.pkl; .*zip -0"
    ):
        take("model", archive, path, zipped)


def test_a_checkpoint_without_a_published_hash_is_a_whole_file_of_torch_save(tmp_path, target):
    target = target.with_name("model.ckpt")
    checkpoint = source("http://host/model.ckpt", file="model.ckpt", sha256=None)
    own = pack(tmp_path / "mine.ckpt", **{"archive/data.pkl": BODY})
    good = own.read_bytes()
    for content, reason in (
        (good[:-1000], "it is not a zip archive, or not all of it"),
        (b"<html>log in</html>", "it is not a checkpoint of torch.save"),
        (b"", "it is empty"),
    ):
        own.write_bytes(content)
        with pytest.raises(ValueError, match=f"mine.ckpt is not model: {reason}"):
            take("model", checkpoint, own, target)
    for content in (good, pickle.dumps({}, 2)):
        own.write_bytes(content)
        take("model", checkpoint, own, target)
