"""Clones have the same bytes whatever git's settings are: results are known by the hashes of their sources."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=Test", "-c", "user.email=test@localhost")
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


def test_a_clone_that_converts_line_endings_has_the_same_bytes(tmp_path):
    files = {
        "a.py": b"a = 1\n",
        "params.yaml": b"a: 1\n",
        "prompts.txt": b"a cat\n",
        "pool.safetensors": b"\x00\r\n\n",
        ".dvc/remote/files/md5/00/ab": b"one\r\ntwo\n",
        "sheet.webp": b"RIFF\r\n\n",
    }
    source = tmp_path / "source"
    for name, data in (files | {".gitattributes": (ROOT / ".gitattributes").read_bytes()}).items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(data)
    git(tmp_path, "init", "-q", "source")
    git(source, "add", ".")
    git(source, "commit", "-q", "-m", "All")
    git(tmp_path, "clone", "-q", "-c", "core.autocrlf=true", "-c", "core.eol=crlf", "source", "clone")
    for name, data in files.items():
        assert (tmp_path / "clone" / name).read_bytes() == data
    assert not git(tmp_path / "clone", "status", "--porcelain")


def test_committed_files_are_text_with_line_feeds_or_binary():
    for line in git(ROOT, "ls-files", "--eol").splitlines():
        found, path = line.split("\t", 1)
        index, _, attributes = found.split(None, 2)
        assert index in ("i/lf", "i/none", "i/-text"), f"{path} has line endings {index}"
        assert "eol=lf" in attributes or "-text" in attributes, f"{path} has no attribute for its line endings"
