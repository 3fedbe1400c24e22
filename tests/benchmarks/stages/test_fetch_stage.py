import hashlib
import json
import random
from pathlib import Path

import pytest
import yaml

from benchmarks.sources import download
from benchmarks.stages import fetch as stage
from benchmarks.stages.fetch import run
from tests.benchmarks.loopback import Loopback

BODY = random.Random(1).randbytes(300_000)
HASH = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A suite's folder as working directory, and a server for its one source, whose hash is not published."""
    monkeypatch.setattr(download, "WAITS", (0, 0))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    served, suite = tmp_path / "served", tmp_path / "suite"
    served.mkdir()
    suite.mkdir()
    monkeypatch.chdir(suite)
    (served / "model.ckpt").write_bytes(BODY)
    with Loopback(served) as loopback:
        describe(loopback)
        yield loopback


def describe(server, **changes):
    entry = {"file": "toy.bin", "urls": [server.url("model.ckpt")], "page": "here", "licence": "MIT"} | changes
    Path("sources.yaml").write_text(yaml.safe_dump({"toy-model": entry}), encoding="utf-8")


def test_the_first_fetch_records_a_hash_and_later_ones_must_have_it(server, capsys):
    assert run("toy-model") == Path("downloads/toy.bin")
    assert Path("downloads/toy.bin").read_bytes() == BODY
    assert capsys.readouterr().out == (
        f"toy-model: downloads/toy.bin, 300,000 bytes, SHA-256 {HASH}, which no one publishes: recorded in"
        " fetched.json now, and checked from now on\n"
    )
    origin = server.url("model.ckpt")
    record = {"toy-model": {"file": "toy.bin", "bytes": 300_000, "sha256": HASH, "origin": origin}}
    assert json.loads(Path("fetched.json").read_text(encoding="utf-8")) == record

    run("toy-model")
    assert "as recorded in fetched.json at the first fetch" in capsys.readouterr().out
    assert server.sent["model.ckpt"] == len(BODY)

    Path("downloads/toy.bin").unlink()
    (server.folder / "model.ckpt").write_bytes(BODY[::-1])
    with pytest.raises(ValueError, match=rf"not {HASH}; kept as .*\(fetched.json has those of the first copy: remove"):
        run("toy-model")
    (server.folder / "model.ckpt").write_bytes(BODY + b"!")
    with pytest.raises(ValueError, match=r"300,001 bytes there, not 300,000\).*fetched.json has those of the first"):
        run("toy-model")
    assert json.loads(Path("fetched.json").read_text(encoding="utf-8")) == record


def test_a_published_hash_needs_no_record(server, capsys):
    describe(server, sha256=HASH)
    run("toy-model")
    assert capsys.readouterr().out.endswith(f"SHA-256 {HASH}, as published\n")
    assert not Path("fetched.json").exists()


def test_a_published_md5_is_no_sha256(server, capsys):
    describe(server, md5=hashlib.md5(BODY).hexdigest())
    run("toy-model")
    assert capsys.readouterr().out.endswith("now, and checked from now on; its MD5 is as published\n")
    assert "toy-model" in stage.fetched()


def test_a_file_that_was_damaged_since_is_kept_aside_and_fetched_anew(server):
    run("toy-model")
    path = Path("downloads/toy.bin")
    path.write_bytes(BODY[:1000] + b"!" + BODY[1001:])
    with pytest.raises(ValueError, match="downloads/toy.bin has changed: .*kept as downloads/toy.bin.bad, run again"):
        run("toy-model")
    run("toy-model")
    assert path.read_bytes() == BODY


def test_the_users_own_file_is_taken_without_a_server(server, tmp_path, capsys):
    own = tmp_path / "mine.ckpt"
    own.write_bytes(BODY)
    run("toy-model", own)
    assert Path("downloads/toy.bin").samefile(own)
    assert stage.fetched()["toy-model"].origin == "the user's own mine.ckpt"
    assert not server.asked
    other = tmp_path / "other.ckpt"
    other.write_bytes(BODY[:-1])
    with pytest.raises(ValueError, match=r"other.ckpt is not toy-model: it has 299,999 bytes, not 300,000"):
        run("toy-model", other)
    assert Path("downloads/toy.bin").read_bytes() == BODY


def test_an_unknown_source_and_damaged_records_are_one_line(server):
    with pytest.raises(ValueError, match="unknown source 'toy-modle': did you mean 'toy-model'"):
        run("toy-modle")
    Path("fetched.json").write_text('{"toy-model": {"file": "toy.bin"}}', encoding="utf-8")
    with pytest.raises(ValueError, match="fetched.json is damaged .*restore it from git"):
        run("toy-model")
    Path("fetched.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match="fetched.json is damaged"):
        run("toy-model")
    record = {"toy-model": {"file": "old.ckpt", "bytes": 1, "sha256": HASH, "origin": ""}}
    Path("fetched.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(ValueError, match="knows toy-model as old.ckpt, not toy.bin"):
        run("toy-model")


def test_what_other_sources_recorded_stays(server):
    record = {"another": {"file": "b", "bytes": 1, "sha256": HASH, "origin": "x"}}
    Path("fetched.json").write_text(json.dumps(record), encoding="utf-8")
    run("toy-model")
    assert list(json.loads(Path("fetched.json").read_text(encoding="utf-8"))) == ["another", "toy-model"]
