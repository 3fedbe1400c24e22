"""Taking one member out of an archive that was downloaded."""

import pytest

from benchmarks.sources import disk
from benchmarks.sources.archive import extract_member
from tests.benchmarks.archives import pack

BODY = bytes(range(256)) * 2400  # 614,400 bytes


def test_a_member_is_taken_out_of_an_archive(tmp_path):
    members = {"../../evil/model.ckpt": BODY, "__MACOSX/._model.ckpt": b"x", "dir/": b"", "readme.txt": b"r"}
    archive = pack(tmp_path / "a.zip", **members)
    to = tmp_path / "deep" / "er" / "out.ckpt"
    extract_member(archive, "model.ckpt", to)
    assert to.read_bytes() == BODY
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()) == [
        "a.zip",
        "deep/er/out.ckpt",
    ]
    assert not (tmp_path.parent / "evil").exists()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.txt": b"a"}, "has no member that ends with model.ckpt, but has a.txt"),
        ({}, "has no member that ends with model.ckpt, but has none at all"),
        (
            {"a/model.ckpt": b"a", "b/model.ckpt": b"b"},
            "several members that end with model.ckpt: a/model.ckpt, b/model",
        ),
    ],
)
def test_no_member_or_several_are_refused(tmp_path, members, message):
    with pytest.raises(ValueError, match=message):
        extract_member(pack(tmp_path / "a.zip", **members), "model.ckpt", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip"]


def test_damaged_archives_and_small_disks_leave_nothing(tmp_path, monkeypatch):
    archive = pack(tmp_path / "a.zip", **{"model.ckpt": BODY})
    good = archive.read_bytes()
    for damaged in (good[:-10], good[:2000] + b"!" + good[2001:], b"no archive"):
        archive.write_bytes(damaged)
        with pytest.raises(ValueError, match="^it is not a zip archive, or damaged"):
            extract_member(archive, "model.ckpt", tmp_path / "out")
    archive.write_bytes(good)
    usage = disk.shutil.disk_usage(".")
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda folder: usage._replace(free=len(BODY) - 1))
    with pytest.raises(ValueError, match="614,400 bytes are needed"):
        extract_member(archive, "model.ckpt", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip"]
    with pytest.raises(ValueError, match="there is no .*absent.zip: fetch it first"):
        extract_member(tmp_path / "absent.zip", "model.ckpt", tmp_path / "out")
