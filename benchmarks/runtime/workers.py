"""Units of work for a pool of processes: each computes one unit after the other, on a CPU with one thread, or on a GPU.

One thread a process uses the cores better than many threads of one process, and makes bytes independent of the pool. On
a machine with several GPUs the processes take turns in which one they compute on.

On a cluster `benchmarks.runtime.engine` takes the place of the pool. On one machine the pool stays: its processes start
in no time, by a fork, and need nothing installed, where Ray starts seven processes of its own first.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing.sharedctypes import Synchronized
from typing import TypeVar

import torch
from tqdm import tqdm

from benchmarks.runtime import engine
from benchmarks.runtime.devices import device_of
from benchmarks.runtime.engine import PATIENCE, Engine, RayEngine

T = TypeVar("T")


def default_shards(device: torch.device) -> int:
    """Processes unless told otherwise: one a CPU core, or one a GPU, of this machine or of the Ray cluster."""
    if engine.chosen() == engine.RAY:
        return engine.slots(device)
    if device.type == "cuda":
        return torch.cuda.device_count()
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_units(
    units: Iterable[T],
    do: Callable[[T], object],
    shards: int,
    device: torch.device,
    then: Callable[[T], Iterable[T]] = lambda unit: (),
    watch: Callable[[Sequence[T]], object] | None = None,
) -> list[tuple[T, BaseException]]:
    """Do ``units`` in their order in ``shards`` processes (1: in this one), then those that ``then`` returned for them.

    On a Ray cluster, if the environment asks for that, as many are done at a time as it has CPUs or GPUs.
    A unit is taken from ``units`` when a process is free for it. ``watch``, in place of a progress bar, is called with
    the units that are being done: about every second, or with one process before each. A unit that raises stops no
    other one; returns these units with what they raised. Raises ValueError if a process of this machine dies, and if
    the cluster is unfit. Call ``torch.set_num_threads(1)`` before.
    """
    if engine.chosen() == engine.RAY:
        where: Engine = RayEngine(device)
    else:
        where = _ThisProcess() if shards == 1 else _Pool(shards, device)
    with where:
        return do_all(units, do, where, then, watch)


def do_all(
    units: Iterable[T],
    do: Callable[[T], object],
    where: Engine,
    then: Callable[[T], Iterable[T]] = lambda unit: (),
    watch: Callable[[Sequence[T]], object] | None = None,
) -> list[tuple[T, BaseException]]:
    """`run_units` on an engine: what decides the order in which units start."""
    failures: list[tuple[T, BaseException]] = []
    first, later = iter(units), deque[T]()
    running: dict[object, T] = {}

    def take(most: int) -> list[T]:
        taken = list(islice(first, most))
        return taken + [later.popleft() for _ in range(min(most - len(taken), len(later)))]

    with tqdm(unit="unit", disable=None if watch is None else True) as progress:
        while True:
            running |= {where.start(do, unit): unit for unit in take(max(where.size() - len(running), 0))}
            if not running:
                return failures
            if watch is not None:
                watch(list(running.values()))
            for handle, error in where.finished():
                unit = running.pop(handle)
                if error is None:
                    later.extend(then(unit))
                else:
                    failures.append((unit, error))
                progress.update()


def run_all(units: Iterable[T], do: Callable[[T], object], shards: int, device: torch.device) -> None:
    """`run_units` where all have to succeed: raises what the first failing one did."""
    for _, error in run_units(units, do, shards, device):
        raise error


class _ThisProcess:
    """The engine that does a unit when it is asked what is finished."""

    def __init__(self) -> None:
        self._next: tuple[object, Callable[..., object], object] | None = None

    def __enter__(self) -> _ThisProcess:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def size(self) -> int:
        return 1

    def start(self, do: Callable[..., object], unit: object) -> object:
        self._next = object(), do, unit
        return self._next[0]

    def finished(self) -> list[tuple[object, BaseException | None]]:
        handle, do, unit = self._next
        try:
            do(unit)
        except Exception as error:
            return [(handle, error)]
        return [(handle, None)]


class _Pool:
    """The engine of so many processes of this machine."""

    def __init__(self, shards: int, device: torch.device) -> None:
        context = _context(device)
        started = context.Value("i", 0)
        self._shards = shards
        self._executor = ProcessPoolExecutor(shards, context, _begin, (os.getpid(), device.type, started))
        self._running: set[Future] = set()

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is KeyboardInterrupt:  # which workers do not hear
            for child in multiprocessing.active_children():
                child.kill()
        self._executor.shutdown()

    def size(self) -> int:
        return self._shards

    def start(self, do: Callable[..., object], unit: object) -> Future:
        future = self._executor.submit(do, unit)
        self._running.add(future)
        return future

    def finished(self) -> list[tuple[Future, BaseException | None]]:
        done, self._running = wait(self._running, PATIENCE, FIRST_COMPLETED)
        found = [(future, future.exception()) for future in done]
        for _, error in found:
            if isinstance(error, BrokenProcessPool):
                raise ValueError(
                    "a worker process died, most likely for lack of memory: what is finished is kept, run it again with"
                    " --shards 1"
                ) from error
        return found


def _context(device: torch.device) -> multiprocessing.context.BaseContext:
    # A fork has all modules imported, which takes seconds otherwise. It is safe while this process has computed nothing
    # with more than one thread; CUDA does not survive it.
    return multiprocessing.get_context("fork" if sys.platform == "linux" and device.type == "cpu" else "spawn")


def _begin(parent: int, device_name: str, started: Synchronized) -> None:
    """What each worker does first: take its GPU, ignore Ctrl-C, which its parent handles, and end when that does.

    ``started`` counts the workers that have begun.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    with started.get_lock():
        worker = started.value
        started.value += 1
    if device_name == "cuda":
        device_of(device_name)  # a new process has none of this one's settings
        torch.cuda.set_device(gpu_of(worker))
    _end_with(parent)


def gpu_of(worker: int) -> int:
    """The GPU that a worker computes on, of those that torch sees."""
    return worker % torch.cuda.device_count()


def _end_with(parent: int) -> None:
    """Let this worker end when its parent has died, instead of waiting for work for ever."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
