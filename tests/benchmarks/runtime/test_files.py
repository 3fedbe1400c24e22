"""Files of cells: images in parts, folders that appear whole and have one process, tensors on the disk."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.runtime import files
from benchmarks.runtime.images import Images, batch_name
from benchmarks.suite.record import Cell


def test_images_are_read_a_few_at_a_time_in_their_order(tmp_path):
    stored = torch.randint(0, 256, (7, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for index, part in enumerate(stored.split(3)):
        files.write_tensors(tmp_path / batch_name(index), {"images": part})
    images = Images(tmp_path)
    assert len(images) == 7 and images.shape == (7, 3, 4, 4)
    for size in (1, 2, 3, 4, 7, 100):
        found = list(images.batches(size))
        assert [len(batch) for batch in found[:-1]] == [size] * (len(found) - 1) and len(found[-1]) <= size
        assert torch.equal(torch.cat(found), stored)
        assert torch.equal(images.first(size), stored[:size])


def test_images_that_are_missing_or_damaged_say_what_to_run(tmp_path):
    with pytest.raises(ValueError, match="images are missing in .*: run `dvc repro`"):
        files.read_images(Cell("toy", "tfmq", "w4a8"))
    for index in range(3):
        files.write_tensors(tmp_path / batch_name(index), {"images": torch.zeros(2, 3, 4, 4, dtype=torch.uint8)})
    before = files.sha256_folder(tmp_path)
    (tmp_path / batch_name(1)).rename(tmp_path / "00009.safetensors")
    assert files.sha256_folder(tmp_path) != before, "names count"
    with pytest.raises(ValueError, match="images are missing in"):
        len(Images(tmp_path))
    (tmp_path / "00009.safetensors").rename(tmp_path / batch_name(1))
    assert files.sha256_folder(tmp_path) == before
    (tmp_path / batch_name(2)).write_bytes((tmp_path / batch_name(2)).read_bytes()[:-1])
    assert files.sha256_folder(tmp_path) != before
    with pytest.raises(ValueError, match="00002.safetensors is damaged or truncated"):
        list(Images(tmp_path).batches(2))
    with pytest.raises(ValueError, match="none is missing: run `dvc repro`"):
        files.sha256_folder(tmp_path / "none")


def test_tensors_can_lie_on_the_disk_and_leave_no_file(tmp_path, monkeypatch):
    tensor = files.mapped(tmp_path / "folder", 1000, torch.float32)
    tensor.copy_(torch.arange(1000))
    assert torch.equal(tensor[[999, 3]], torch.tensor([999.0, 3.0]))
    assert not list((tmp_path / "folder").iterdir())

    def full(*given: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match="No space left on device"):
        files.mapped(tmp_path / "folder", 1000, torch.float32)
    assert not list((tmp_path / "folder").iterdir())


@pytest.mark.parametrize("links", [True, False])
def test_a_file_stands_at_two_places(tmp_path, monkeypatch, links):
    def refuse(source: Path, target: Path) -> None:
        raise OSError("no links here")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "a").write_text("text")
    files.link(tmp_path / "a", tmp_path / "b")
    (tmp_path / "a").unlink()
    assert (tmp_path / "b").read_text() == "text"


def test_new_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "cell"
    with pytest.raises(RuntimeError), files.new_folder(target) as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_folder_has_one_process_at_a_time(tmp_path):
    """The other process is killed while it holds the folder; then it is free again."""
    folder = tmp_path / "cells" / "w4a8-0123"
    code = (
        "import sys, time; from pathlib import Path; from benchmarks.runtime import files\n"
        "with files.exclusive(Path(sys.argv[1]), 'x'):\n    print('held', flush=True)\n    time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        refused = pytest.raises(ValueError, match="toy/tfmq/w4a8: another process is at work on it in .*-0123: wait")
        with refused, files.exclusive(folder, "toy/tfmq/w4a8"):
            pass
        process.kill()
    with files.exclusive(folder, "toy/tfmq/w4a8"):
        assert folder.is_dir()
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
