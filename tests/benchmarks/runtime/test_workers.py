"""Units of work for one process or many."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.runtime import workers
from benchmarks.runtime.workers import default_shards, run_units

CPU = torch.device("cpu")


def do(unit: tuple[str, Path]) -> None:
    name, folder = unit
    if name == "bad":
        raise ValueError("a bad unit")
    if name == "killed":
        os._exit(1)
    (folder / name).write_text(f"{os.getpid()} {torch.get_num_threads()}")
    time.sleep(0.2)


def then(unit: tuple[str, Path]) -> list[tuple[str, Path]]:
    name, folder = unit
    return [(name + "+", folder)] if name in ("a", "bad") else []


@pytest.mark.parametrize("shards", [1, 2])
def test_all_units_are_done_and_what_follows_them_but_for_those_that_raise(tmp_path, shards):
    failures = run_units([(name, tmp_path) for name in ("a", "bad", "b")], do, shards, CPU, then=then)
    assert [(unit[0], str(error)) for unit, error in failures] == [("bad", "a bad unit")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a+", "b"]
    found = [path.read_text().split() for path in tmp_path.iterdir()]
    assert {threads for _, threads in found} == {"1"}
    assert ({int(process) for process, _ in found} == {os.getpid()}) == (shards == 1)


def test_a_process_that_dies_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="a worker process died.*--shards 1"):
        run_units([("killed", tmp_path)], do, 2, CPU)


@pytest.mark.skipif(sys.platform != "linux", reason="needs workers that inherit the GPUs made up here")
@pytest.mark.parametrize("gpus", [1, 3])
def test_every_gpu_has_its_process_and_processes_take_turns(tmp_path, monkeypatch, gpus):
    """With GPUs that are not there: what each worker asks torch for, and that all units are done."""
    chosen = tmp_path / "chosen"
    chosen.mkdir()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: (chosen / f"{os.getpid()}").write_text(str(index)))
    monkeypatch.setattr(workers, "_context", lambda device: multiprocessing.get_context("fork"))
    device = torch.device("cuda")
    assert default_shards(device) == gpus
    units = [(f"unit{i}", tmp_path) for i in range(8)]
    assert not run_units(units, do, 4, device)
    assert sorted(path.name for path in tmp_path.glob("unit*")) == sorted(name for name, _ in units)
    assert sorted(int(path.read_text()) for path in chosen.iterdir()) == sorted(i % gpus for i in range(4))


def test_a_cpu_has_a_process_a_core():
    assert default_shards(CPU) >= 1


def test_ctrl_c_ends_the_workers_though_they_do_not_hear_it(tmp_path):
    """A unit that sleeps for a minute, stopped after it has begun."""
    code = (
        "import signal, sys, time; from pathlib import Path; import torch\n"
        "from benchmarks.runtime.workers import run_units\n"
        # Where the tests run in the background, Ctrl-C is ignored, and children inherit that.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def do(unit):\n    Path(sys.argv[1], str(unit)).touch()\n    time.sleep(60)\n"
        "run_units([1, 2], do, 2, torch.device('cpu'))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while len(list(tmp_path.iterdir())) < 2:
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert err.count("KeyboardInterrupt\n") == 1
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
