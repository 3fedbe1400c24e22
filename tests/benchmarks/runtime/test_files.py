"""What files promise to those who share a folder."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks.runtime import files


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
