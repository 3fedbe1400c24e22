"""The tests of `on_pretend_device`, in a process of their own: a device cannot be taken away again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.tfmq import networks

FILE = Path(networks.__file__).with_name("on_pretend_device.py")


def test_every_part_of_the_library_runs_on_another_device(root):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(FILE)]
    done = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
