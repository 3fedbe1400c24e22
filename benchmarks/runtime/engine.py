"""Units of work on the machines of a Ray cluster, in place of the processes of this machine.

With the variable ``TFMQ_BENCH_ENGINE=ray``, `benchmarks.runtime.workers` starts units here. A worker is a process
somewhere in the cluster, with one GPU on CUDA, else one CPU and one thread, and does one unit after the other as a
process of this machine would, to the same bytes; so all nodes have to have the same versions, code and kind of
processor. Units and this process read and write one working folder: it lies on a file system that all nodes share,
under the same path. A worker checks both before its first unit.

That a worker dies, by a crash, for lack of memory or with its node, is not its unit's fault: the unit starts again on
another one. What a unit itself raises is its result. Files are written under temporary names first, so that half a unit
leaves nothing behind, and one that runs twice makes the same file twice.

Ray sends pickles: whoever can reach a cluster's ports can run code on it. Keep it in a network that you trust.
"""

from __future__ import annotations

import os
import pickle
import socket
import sys
import textwrap
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol
from uuid import uuid4

import torch
from tqdm import tqdm

from benchmarks.runtime import environment, files
from benchmarks.runtime.devices import device_of

# Which engine runs units: `processes` (the default) or `ray`.
VARIABLE = "TFMQ_BENCH_ENGINE"
PROCESSES, RAY = "processes", "ray"
# How often a unit starts again whose worker died; so many workers may die as they start.
RETRIES = 3
# Seconds after which `finished` returns with nothing.
PATIENCE = 1.0
CODE = ("tfmq", "baselines", "benchmarks")


class Engine(Protocol):
    """Where `benchmarks.runtime.workers.do_all` has units done. A context, at whose end nothing of it runs any more."""

    def size(self) -> int:
        """How many units to have started at a time; at least 1, and it may change."""

    def start(self, do: Callable[..., object], unit: object) -> object:
        """Have ``do(unit)`` done; returns a handle, which is hashable."""

    def finished(self) -> list[tuple[object, BaseException | None]]:
        """The handles of units that are done since, with what they raised; none after `PATIENCE` seconds.

        Raises ValueError where no unit can be done any more.
        """


def chosen() -> str:
    """The engine that the environment asks for. Raises ValueError for an unknown one."""
    name = os.environ.get(VARIABLE) or PROCESSES
    if name not in (PROCESSES, RAY):
        raise ValueError(f"{VARIABLE} is {name!r}: set it to {PROCESSES} or {RAY}")
    return name


def slots(device: torch.device) -> int:
    """Units that the Ray cluster can do at a time, as it is now. Raises ValueError if there are none, or no cluster."""
    found = _slots(_connected(), device)
    if not found:
        lacks = "GPU: start its nodes with them, or use --device cpu" if device.type == "cuda" else "CPU"
        raise ValueError(f"the Ray cluster has no {lacks}")
    return found


@dataclass(eq=False)
class Started:
    """A unit that waits for a worker, or has one.

    Attributes:
        began: when a worker last began it.
        deaths: of workers that had it.
    """

    do: Callable[..., object]
    unit: object
    began: float = 0.0
    deaths: int = 0


class RayEngine:
    """Workers on the cluster that Ray's variable ``RAY_ADDRESS`` names, or on that of this machine: one a CPU or GPU.

    Nodes may come and go. Raises ValueError, in one line, where there is no cluster or none with such a device.
    """

    def __init__(self, device: torch.device) -> None:
        slots(device)
        self._ray, self._device = _connected(), device
        need = {"num_cpus": 0, "num_gpus": 1} if device.type == "cuda" else {"num_cpus": 1}
        self._worker = self._ray.remote(**need)(_worker())
        self._about = _described(device)
        self._probe = Path.cwd() / files.RESUME / f"engine-{uuid4().hex}"
        self._waiting = deque[Started]()
        # By Ray's reference to what each worker is at: with the file that it answers with as it starts, or its unit.
        self._starting: dict[Any, tuple[Any, Path]] = {}
        self._busy: dict[Any, tuple[Any, Started]] = {}
        self._idle: list[Any] = []
        self._count = self._dead_starts = 0
        self._alone = False

    def __enter__(self) -> RayEngine:
        files.write_text(self._probe, "Workers of another node look for this file.\n")
        return self

    def __exit__(self, *_: object) -> None:
        for worker in (*self._idle, *(worker for worker, _ in (*self._starting.values(), *self._busy.values()))):
            self._ray.kill(worker)
        for path in self._probe.parent.glob(f"{self._probe.name}*"):
            path.unlink(missing_ok=True)

    def size(self) -> int:
        """See `Engine`: the cluster's CPUs or GPUs, those of nodes that have joined among them."""
        found = _slots(self._ray, self._device)
        if not found and not self._alone:
            _say("no node of the Ray cluster is left that can do a unit: waiting for one to join")
        self._alone = not found
        return max(found, 1)

    def start(self, do: Callable[..., object], unit: object) -> Started:
        """See `Engine`."""
        started = Started(do, unit)
        self._waiting.append(started)
        return started

    def finished(self) -> list[tuple[Started, BaseException | None]]:
        """See `Engine`. A unit whose worker died starts again, `RETRIES` times at most; standard error says so."""
        self._give()
        found, _ = self._ray.wait([*self._starting, *self._busy], timeout=PATIENCE)
        done: list[tuple[Started, BaseException | None]] = []
        for reference in found:
            if reference in self._starting:
                self._admit(reference)
                continue
            worker, started = self._busy.pop(reference)
            try:
                self._ray.get(reference)
                done.append((started, None))
            except self._ray.exceptions.RayTaskError as raised:
                raised.cause.__cause__ = raised  # whose text is the traceback on the node
                done.append((started, raised.cause))
            except self._ray.exceptions.RayError as died:
                self._ray.kill(worker)  # which may only be out of sight
                failure = self._after_death(started, died)
                done += [] if failure is None else [(started, failure)]
                continue
            self._idle.append(worker)
        return done

    def _give(self) -> None:
        """Give units that wait to idle workers, and start workers where the cluster has room for more."""
        while self._waiting and self._idle:
            worker, started = self._idle.pop(), self._waiting.popleft()
            started.began = time.monotonic()
            work = self._ray.cloudpickle.dumps((started.do, started.unit))
            self._busy[worker.do.remote(work)] = worker, started
        lacking = min(self.size() - len(self._busy), len(self._waiting)) - len(self._starting)
        for _ in range(lacking):
            self._count += 1
            worker, answer = self._worker.remote(), self._probe.with_name(f"{self._probe.name}-{self._count}")
            answer.exists()  # a network file system may remember that it is not, which `_admit` then finds out
            reference = worker.join.remote(
                str(environment.ROOT), str(Path.cwd()), str(self._probe), str(answer), self._device.type, self._about
            )
            self._starting[reference] = worker, answer

    def _admit(self, reference: object) -> None:
        """Take a worker on that has started. Raises ValueError if its node is unfit."""
        worker, answer = self._starting.pop(reference)
        try:
            objection = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as raised:
            raise ValueError(f"a worker could not start: {raised.cause!r}") from raised
        except self._ray.exceptions.RayError as died:
            self._ray.kill(worker)
            self._dead_starts += 1
            if self._dead_starts > RETRIES:
                raise ValueError(f"workers die as they start: {_line(died)}") from died
            return
        if not objection and not answer.exists():
            objection = (
                f"{Path.cwd()} does not show what another node has just written there: mount it with"
                " lookupcache=positive"
            )
        if objection:
            raise ValueError(objection)
        answer.unlink()
        self._dead_starts = 0
        self._idle.append(worker)

    def _after_death(self, started: Started, died: Exception) -> ValueError | None:
        """Let a unit wait for another worker, or say why not."""
        started.deaths += 1
        seconds = time.monotonic() - started.began
        what = f"{name_of(started.unit)}: its worker or node died after {seconds:.0f} s"
        if started.deaths > RETRIES:
            return ValueError(f"{what}, for the {started.deaths}th time, most likely for lack of memory: {_line(died)}")
        _say(f"{what}, and it starts again ({started.deaths} of {RETRIES}): {_line(died)}")
        self._waiting.appendleft(started)
        return None


def name_of(unit: object) -> str:
    """What messages call a unit: its cells, files, or numbers."""
    parts = unit if isinstance(unit, tuple) else (unit,)
    return " ".join(str(getattr(getattr(part, "cell", part), "name", part)) for part in parts)


def begin(device_name: str, about: dict[str, str]) -> str | None:
    """Set this process up for units; returns how its node differs from what ``about`` says, if it does."""
    os.environ[VARIABLE] = PROCESSES  # where a unit runs units, these run here
    torch.set_num_threads(1)
    found = _described(device_of(device_name))  # a new process has none of the driver's settings
    for what, value in about.items():
        if found[what] != value:
            return (
                f"node {socket.gethostname()} has {what} {found[what]}, and this one {value}: units of one run have to"
                " be computed alike, so leave that node out"
            )
    return None


def _described(device: torch.device) -> dict[str, str]:
    """What units have to have in common, on whichever node they run."""
    about = environment.machine(device)
    versions = {name: str(version) for name, version in about["versions"].items()}
    processor = about["gpu"] if device.type == "cuda" else about["cpu"]
    code = files.source_hash(*(environment.ROOT / name for name in CODE))[:12]
    return {"Python": str(about["python"]), **versions, "the processor": str(processor), "code": code}


def _worker() -> type:
    """The class of workers. Being inside a function it is sent as it is, also to nodes where this module is not."""

    class Worker:
        def join(self, root: str, folder: str, probe: str, answer: str, device: str, about: dict) -> str | None:
            """Check what the node shares with the driver; returns an objection, if there is one."""
            import os
            import socket
            import sys
            from pathlib import Path

            if not Path(probe).exists():
                return (
                    f"node {socket.gethostname()} does not share {folder} with this one: work on a file system that all"
                    " nodes mount under the same path"
                )
            Path(answer).touch()
            os.chdir(folder)
            sys.path.insert(0, root)  # before what is installed there, which may have modules of the same names
            from benchmarks.runtime import engine

            return engine.begin(device, about)

        def do(self, work: bytes) -> None:
            do, unit = pickle.loads(work)
            do(unit)

    return Worker


def _connected() -> ModuleType:
    """Ray, connected to its cluster. Raises ValueError, saying what to do, where there is none."""
    try:
        import ray
    except ModuleNotFoundError:
        raise ValueError(f"{VARIABLE} is {RAY}, but Ray is not installed: pip install -e '.[cluster]'") from None
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS", "auto")
        host, _, port = address.rpartition(":")
        try:
            if port.isdigit():  # Ray itself tries for minutes
                socket.create_connection((host, int(port)), timeout=10).close()
            ray.init(address=address, log_to_driver=False, logging_level="WARNING")
        except OSError as error:
            where = "on this machine" if address == "auto" else f"at {address}"
            raise ValueError(
                f"{VARIABLE} is {RAY}, but there is no cluster {where}: run `ray start --head` first (docs/cluster.md)"
            ) from error
    return ray


def _slots(ray: ModuleType, device: torch.device) -> int:
    return int(ray.cluster_resources().get("GPU" if device.type == "cuda" else "CPU", 0))


def _line(error: Exception) -> str:
    """The reason at the end of what Ray says, after lines with numbers of processes, which are indented."""
    lines = [line for line in str(error).splitlines() if line and not line[0].isspace()]
    return textwrap.shorten(lines[-1], 160) if lines else type(error).__name__


def _say(text: str) -> None:
    """Write a line to the process's standard error, above a progress bar, also where stages' own output is hidden."""
    tqdm.write(text, file=sys.__stderr__)
