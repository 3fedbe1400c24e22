"""Units of work for a pool of processes: each computes one unit after the other, on a CPU with one thread, or on a GPU.

One thread a process uses the cores better than many threads of one process, and makes bytes independent of the pool. On
a machine with several GPUs the processes take turns in which one they compute on.
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

from benchmarks.runtime.devices import device_of

T = TypeVar("T")

# Seconds after which `run_units` lets its watcher look again.
WATCHED_EVERY = 1.0


def default_shards(device: torch.device) -> int:
    """Processes unless told otherwise: one a CPU core, or one a GPU."""
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

    A unit is taken from ``units`` when a process is free for it. ``watch``, in place of a progress bar, is called with
    the units that are being done: about every second, or with one shard before each. A unit that raises stops no other
    one; returns these units with what they raised. Raises ValueError if a process dies. Call
    ``torch.set_num_threads(1)`` before.
    """
    failures: list[tuple[T, BaseException]] = []
    first, later = iter(units), deque[T]()

    def take(most: int) -> list[T]:
        taken = list(islice(first, most))
        return taken + [later.popleft() for _ in range(min(most - len(taken), len(later)))]

    def finish(unit: T, error: BaseException | None) -> None:
        if error is None:
            later.extend(then(unit))
        else:
            failures.append((unit, error))
        progress.update()

    with tqdm(unit="unit", disable=None if watch is None else True) as progress:
        if shards == 1:
            while taken := take(1):
                (unit,) = taken
                if watch is not None:
                    watch([unit])
                try:
                    do(unit)
                except Exception as error:
                    finish(unit, error)
                else:
                    finish(unit, None)
            return failures
        context = _context(device)
        started = context.Value("i", 0)
        with ProcessPoolExecutor(shards, context, _begin, (os.getpid(), device.type, started)) as executor:
            running: dict[Future, T] = {}
            try:
                while True:
                    running |= {executor.submit(do, unit): unit for unit in take(shards - len(running))}
                    if not running:
                        return failures
                    if watch is not None:
                        watch(list(running.values()))
                    for future in wait(running, WATCHED_EVERY, FIRST_COMPLETED).done:
                        unit, error = running.pop(future), future.exception()
                        if isinstance(error, BrokenProcessPool):
                            raise ValueError(
                                "a worker process died, most likely for lack of memory: what is finished is kept, run"
                                " it again with --shards 1"
                            ) from error
                        finish(unit, error)
            except KeyboardInterrupt:  # which workers do not hear
                for child in multiprocessing.active_children():
                    child.kill()
                raise


def run_all(units: Iterable[T], do: Callable[[T], object], shards: int, device: torch.device) -> None:
    """`run_units` where all have to succeed: raises what the first failing one did."""
    for _, error in run_units(units, do, shards, device):
        raise error


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
