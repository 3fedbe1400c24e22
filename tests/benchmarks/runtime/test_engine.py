"""Units on a Ray cluster: two nodes of this machine, on which workers die, a node goes and another one joins."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.runtime import engine, files
from benchmarks.runtime.workers import default_shards, run_units
from benchmarks.stages import generate as stage
from tests.benchmarks.tiny_suite import arguments, prepared, run, suite

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

__all__ = ["prepared", "run", "suite"]

CPU = torch.device("cpu")
ROW = Path("work/cells/toy/nearest")
# The command line in a process that kills itself when a unit is finished.
KILLED = """
import os, signal, sys
from benchmarks.__main__ import main
from benchmarks.stages import generate

generate.then = lambda unit: os.kill(os.getpid(), signal.SIGKILL)
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes with one CPU each; this process works on the first."""
    import ray
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")  # which Ray would send out
        patch.setenv("RAY_worker_niceness", "0")  # beside other tests
        found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        found.add_node(num_cpus=1)
        patch.setenv("RAY_ADDRESS", found.address)
        yield found
        ray.shutdown()
        found.shutdown()


@pytest.fixture
def on_ray(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(engine.VARIABLE, engine.RAY)


@dataclass
class Drill:
    """What came of a run with faults: units that failed, with their errors; what each run of a unit noted."""

    failures: list[tuple[str, BaseException]]
    said: str
    notes: dict[str, list[list[str]]] = field(default_factory=dict)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def drill(cluster: Cluster, folder: Path) -> Drill:
    """A worker is killed; then, while two long units run, the node of one is killed and another node joins."""
    from tests.benchmarks.runtime.faulty_units import do, then

    (second,) = cluster.worker_nodes
    lost = False

    def watch(running: Sequence[tuple[str, Path]]) -> None:
        nonlocal lost
        if not lost and all((folder / name).exists() for name in ("long1", "long2")):
            lost = True
            cluster.remove_node(second, allow_graceful=False)
            cluster.add_node(num_cpus=1)
            (folder / "node lost").touch()

    names = ("killed", "bad", "full", "a", "long1", "long2")
    said = folder / "said"
    with pytest.MonkeyPatch.context() as patch, said.open("w") as stderr:
        patch.setenv(engine.VARIABLE, engine.RAY)
        patch.chdir(folder)
        patch.setattr(sys, "__stderr__", stderr)
        failures = run_units([(name, folder) for name in names], do, 1, CPU, then, watch)
    notes = {path.name: [line.split() for line in path.read_text().splitlines()] for path in folder.glob("[!.]*")}
    return Drill([(unit[0], error) for unit, error in failures], said.read_text(), notes)


def test_what_a_unit_raises_is_its_own_and_stops_no_other(drill):
    found = dict(drill.failures)
    assert set(found) == {"bad", "full"}
    assert isinstance(found["bad"], ValueError) and str(found["bad"]) == "a bad unit"
    assert isinstance(found["full"], OSError) and found["full"].errno == errno.ENOSPC
    assert "in do" in str(found["bad"].__cause__), "where it was raised"
    assert {"a", "a+", "long1", "long2"} <= set(drill.notes)


def test_a_unit_has_one_thread_and_the_drivers_folder_and_does_its_own_units_there(drill, folder):
    runs = [run for name in ("killed", "a", "a+", "long1", "long2") for run in drill.notes[name]]
    assert {tuple(run[2:]) for run in runs} == {("1", engine.PROCESSES, str(folder))}
    assert len({run[0] for run in runs}) > 1


def test_a_unit_starts_again_when_its_worker_or_node_dies_and_only_then(drill):
    times = {name: len(drill.notes[name]) for name in ("killed", "bad", "full", "a", "a+")}
    assert times == {"killed": 2, "bad": 1, "full": 1, "a": 1, "a+": 1}
    assert sorted(len(drill.notes[name]) for name in ("long1", "long2")) == [1, 2]
    (again,) = (runs for name in ("long1", "long2") if len(runs := drill.notes[name]) == 2)
    assert again[0][0] != again[1][0], "the node that it was on is gone"
    lines = [line for line in drill.said.splitlines() if "starts again" in line]
    assert len(lines) == 2 and lines[0].startswith("killed ") and lines[1].startswith("long")
    assert all("its worker or node died after" in line and "(1 of 3)" in line for line in lines)


def test_a_second_run_does_what_failed_and_leaves_nothing(drill, folder, on_ray, monkeypatch):
    from tests.benchmarks.runtime.faulty_units import do

    (folder / "room").touch()
    monkeypatch.chdir(folder)
    assert default_shards(CPU) in (2, 3), "one a CPU; that of the lost node counts until the cluster misses it"
    assert run_units([("full", folder)], do, 1, CPU) == []
    assert len((folder / "full").read_text().splitlines()) == 2
    assert list((folder / files.RESUME).iterdir()) == []


def test_a_driver_that_is_killed_goes_on_to_the_bytes_of_one_process(suite, run, root, on_ray, monkeypatch):
    row = arguments("generate", "nearest", "w4a8")
    command = [sys.executable, "-c", KILLED, *row]
    assert subprocess.run(command, env=os.environ | {"PYTHONPATH": str(root)}).returncode == -signal.SIGKILL
    kept = {path.name for path in Path(".resume/toy").rglob("*.safetensors") if path.parent.name != files.IMAGES}
    assert files.QUANTIZED in kept and not ROW.exists()
    later = []
    monkeypatch.setattr(stage, "then", lambda unit, then=stage.then: (later.append(unit[1]), then(unit))[1])
    assert run(*row) == (0, [])
    assert not kept & set(later) and kept | set(later) == {files.QUANTIZED, files.ERRORS} | {
        f"part-0000{index}.safetensors" for index in range(3)
    }
    made = contents()
    shutil.rmtree(ROW)
    monkeypatch.setenv(engine.VARIABLE, engine.PROCESSES)
    assert run(*row) == (0, [])
    assert contents() == made


def contents() -> dict[str, object]:
    """The images, errors and quantised network of the row's cell."""
    cell = ROW / "w4a8"
    found: dict[str, object] = {path.name: path.read_bytes() for path in (cell / files.IMAGES).iterdir()}
    network = {name: tensor.numpy().tobytes() for name, tensor in load_file(cell / files.QUANTIZED).items()}
    return found | {files.ERRORS: (cell / files.ERRORS).read_bytes(), files.QUANTIZED: network}


# What is wrong with a node or a cluster is one line.


@pytest.fixture
def no_engine(monkeypatch):
    """What a worker sets in its process is undone here."""
    monkeypatch.setenv(engine.VARIABLE, "")


def test_a_node_of_other_code_is_refused(no_engine):
    about = engine._described(CPU)
    assert engine.begin("cpu", about) is None and os.environ[engine.VARIABLE] == engine.PROCESSES
    objection = engine.begin("cpu", about | {"code": "abc"})
    assert objection.startswith("node ") and f"has code {about['code']}, and this one abc" in objection


def test_a_node_that_does_not_share_the_folder_is_refused(tmp_path):
    objection = engine._worker()().join("", "/suite", str(tmp_path / "missing"), "", "cpu", {})
    assert "does not share /suite with this one: work on a file system that all nodes mount" in objection


def test_an_unknown_engine_a_missing_ray_and_no_cluster_say_what_to_do(monkeypatch):
    monkeypatch.setenv(engine.VARIABLE, "rya")
    with pytest.raises(ValueError, match="TFMQ_BENCH_ENGINE is 'rya': set it to processes or ray"):
        run_units([1], print, 1, CPU)
    monkeypatch.setenv(engine.VARIABLE, engine.RAY)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    ray = SimpleNamespace(is_initialized=lambda: False)
    for module, message in (
        (None, r"Ray is not installed: pip install -e '.\[cluster\]'"),
        (ray, "no cluster at 127.0.0.1:1: run `ray start --head` first"),
    ):
        monkeypatch.setitem(sys.modules, "ray", module)
        with pytest.raises(ValueError, match=message):
            run_units([1], print, 1, CPU)


def test_units_are_named_by_their_cells_and_files():
    assert engine.name_of(("a", Path("x/y.safetensors"))) == "a y.safetensors"
    assert engine.name_of(3) == "3"
