"""`dvc repro` of everything, with progress: cells done of all, the time left, and each table when its rows are there.

Works in this checkout: it writes results/, and skips what DVC finds unchanged. Stopped, it goes on where it was when it
is started again. Exit code 1 if a cell fails. Cells that differ from the records of the last commit are named.
"""

from __future__ import annotations

import argparse
import io
import os
import queue
import re
import signal
import subprocess
import sys
import tarfile
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import yaml

from benchmarks.suite.record import FULL_PRECISION
from benchmarks.upkeep import DEVICE_VARIABLE, INTERRUPTED, STOPPED

if TYPE_CHECKING:
    from benchmarks.suite.params import Suite
    from benchmarks.suite.record import Cell, Record
    from benchmarks.upkeep.clock import Clock
    from benchmarks.upkeep.screen import Screen

REPRO = (sys.executable, "-m", "dvc", "repro")
LOCK = Path("dvc.lock")
RUNNING = re.compile(r"Running stage '(.+)':")
UNCHANGED = re.compile(r"Stage '(.+)' (?:didn't change|is cached)")
# Errors and warnings, but for those on locks that a stopped run has left behind.
FAILED = re.compile(r"ERROR:|error:|WARNING:(?!.*RWLock)")
# Of what a stage has printed, this is shown where it fails.
LAST_LINES = 12
# Seconds in which one process has started and loaded what it needs, and those of tables and figures.
START_SECONDS = 8.0
TABLES_SECONDS = 60.0
STOP_SECONDS = 1.0
ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(arguments: list[str] | None = None) -> int:
    """Command line; see the module's text."""
    for ending in ENDINGS:
        signal.signal(ending, lambda signum, frame: _stop(None))
    parser = argparse.ArgumentParser(prog="nox -s bench -- --all", description=__doc__)
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), help=f"where to compute (default: the variable {DEVICE_VARIABLE})"
    )
    options = parser.parse_args(arguments)
    if options.device is not None:
        os.environ[DEVICE_VARIABLE] = options.device  # the stages read it
    try:
        return run()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def run() -> int:
    """Run DVC, show how far it is, and end with the leaderboard; returns the exit code."""
    # Not above: these take seconds, in which Ctrl-C has to be heard.
    from benchmarks.report import tables
    from benchmarks.runtime import workers
    from benchmarks.runtime.devices import device_of
    from benchmarks.suite import params
    from benchmarks.upkeep.clock import Clock, spoken
    from benchmarks.upkeep.screen import HEADER, Screen

    suite = params.load(Path("params.yaml"))
    params.check_methods(suite)
    committed = committed_records(suite)
    shards = workers.default_shards(device_of(os.environ.get(DEVICE_VARIABLE, "auto")))
    clock = Clock(expected(suite, committed, shards), 1)
    screen = Screen(suite, committed, len(suite.cells()))
    screen.write(
        f"`dvc repro`: {screen.total} cells, about {spoken(clock.left())} if none is there yet. It writes results/.\n\n"
        f"{HEADER}"
    )
    failed = _follow(suite, clock, screen) != 0
    screen.close()
    with suppress(OSError, ValueError):  # a README without the table
        print(f"\n{tables.region(Path('README.md').read_text(encoding='utf-8')).strip()}\n")
        print("All tables and figures: results/README.md")
    differing = [cell.name for cell, agreement in screen.agreements.items() if agreement.verdict == "differs"]
    print(
        f"{len(screen.agreements)} cells made in {spoken(clock.elapsed)}, {len(differing)} differ from the last commit."
    )
    if differing:
        print(f"These differ: {', '.join(differing)}")
    if failed:
        print("some cells failed; they are named above", file=sys.stderr)
    return int(failed)


def committed_records(suite: Suite) -> dict[Cell, Record]:
    """The records of the suite's cells in the last commit, as far as this code reads them; none without a commit."""
    from benchmarks.runtime import files
    from benchmarks.suite.record import Record

    command = ["git", "archive", "--format=tar", "HEAD", files.RECORDS.as_posix()]
    found: dict[Cell, Record] = {}
    try:
        archive = subprocess.run(command, check=True, capture_output=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return found
    names = {files.record_file(cell).as_posix(): cell for cell in suite.cells()}
    with tarfile.open(fileobj=io.BytesIO(archive)) as members:
        for member in members:
            if member.name in names:
                with suppress(ValueError):  # of an older schema
                    found[names[member.name]] = Record.from_json(members.extractfile(member).read().decode())
    return found


def expected(suite: Suite, records: Mapping[Cell, Record], shards: int) -> dict[str, float]:
    """Seconds that each stage of `dvc repro` should take with so many processes, by its name."""
    from benchmarks.upkeep import clock

    typical = clock.typical_cell(records.values())
    stages = {"tables": TABLES_SECONDS}
    for task in suite.tasks.values():
        stages[f"calibrate@{task.name}"] = clock.of_pools(records, task.name, suite.pools) / min(shards, suite.pools)
        stages[f"reference@{task.name}"] = clock.of_reference(records, task) / shards
    for cell in suite.cells():
        making, scoring = _stages(suite, cell)
        record = records.get(cell)
        seen = clock.scoring(record) if record is not None else 0.0
        stages[making] = stages.get(making, 0.0) + (clock.of_cell(record, typical) - seen) / shards
        stages[scoring] = stages.get(scoring, 0.0) + seen / shards
    for task in suite.temporal.tasks if suite.temporal else ():
        stages[f"temporal_{task}"] = clock.of_temporal(records, suite, task)
    return {name: seconds + START_SECONDS for name, seconds in stages.items()}


def in_order(suite: Suite) -> list[str]:
    """All stages in an order in which each comes after what it needs.

    DVC keeps it where stages are single items; its own order, which differs from run to run, scores hardly a cell
    before most are made. Here tasks follow one another, and each row is made and then scored.
    """
    stages: dict[str, None] = {}
    for task in suite.tasks:
        cells = [cell for cell in suite.cells() if cell.task == task]  # full precision is the first
        rows = (name for cell in cells for name in _stages(suite, cell))
        stages |= dict.fromkeys([f"calibrate@{task}", f"reference@{task}", *rows])
        if suite.temporal is not None and task in suite.temporal.tasks:
            stages[f"temporal_{task}"] = None
    return [*stages, "tables"]


def _stages(suite: Suite, cell: Cell) -> tuple[str, str]:
    """The stages of dvc.yaml that generate and score a cell."""
    if cell.method == FULL_PRECISION:
        return f"full_precision@{cell.task}", f"score_full_precision@{cell.task}"
    table = next(name for name in suite.tables if cell in suite.measured(name))
    return f"generate_{table}_{cell.method}@{cell.task}", f"score_{table}@{cell.task}-{cell.method}"


def _follow(suite: Suite, clock: Clock, screen: Screen) -> int:
    """Run DVC and show what it does; returns its exit code. Whatever happens, DVC has ended then."""
    from benchmarks.runtime import files

    scored: dict[str, list[Cell]] = {}
    for cell in suite.cells():
        scored.setdefault(_stages(suite, cell)[1], []).append(cell)
    current: str | None = None
    printed: deque[str] = deque(maxlen=LAST_LINES)

    def finish() -> None:
        if current is not None:
            clock.finish(current)
            for cell in scored.get(current, []):
                if files.record_file(cell).exists():  # else its stage failed
                    screen.show(cell, clock.left())
        printed.clear()

    dvc = _Dvc([*REPRO, "--keep-going", "--single-item", *in_order(suite)])
    try:
        for line in dvc.lines():
            if found := RUNNING.match(line):
                finish()
                dvc.keep_lock()
                current = found[1]
                clock.start(current)
            elif found := UNCHANGED.match(line):
                finish()
                current = None
                clock.drop(found[1])
                screen.skip(scored.get(found[1], []))
            elif FAILED.match(line):
                screen.write("\n".join([*printed, line]))
                printed.clear()
            elif line:
                printed.append(line)
            if current is not None:
                screen.status([current], clock.left())
        finish()
        return dvc.process.wait()
    finally:
        dvc.end()


class _Dvc:
    """DVC in a session of its own: Ctrl-C reaches this process alone, which then ends DVC, its stage and workers."""

    def __init__(self, command: list[str]) -> None:
        self._lock: bytes | None = None
        self.keep_lock()
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDINGS)
        try:
            self.process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
                preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDINGS),
            )
            for ending in ENDINGS:
                signal.signal(ending, lambda signum, frame: _stop(self))
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDINGS)

    def lines(self) -> Iterator[str]:
        """The lines that it prints, and an empty one every second, until it ends."""
        found: queue.SimpleQueue[str | None] = queue.SimpleQueue()

        def read() -> None:
            for line in self.process.stdout:
                found.put(line.rstrip())
            found.put(None)

        threading.Thread(target=read, daemon=True).start()
        while True:
            try:
                line = found.get(timeout=1.0)
            except queue.Empty:
                line = ""
            if line is None:
                return
            yield line

    def keep_lock(self) -> None:
        """Remember dvc.lock, which is whole while a stage runs; DVC rewrites it in place after each."""
        self._lock = LOCK.read_bytes() if LOCK.exists() else None

    def end(self) -> None:
        """End all its processes, if any is left, and bring dvc.lock back where that has cut it off."""
        for kind in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, kind)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_SECONDS)
        if self._lock is not None and LOCK.read_bytes() != self._lock:
            try:
                yaml.load(LOCK.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
            except (yaml.YAMLError, ValueError):
                LOCK.write_bytes(self._lock)


def _stop(dvc: _Dvc | None) -> NoReturn:
    """Ctrl-C: end at once, with one line and no process left."""
    if dvc is not None:
        dvc.end()
    print(f"\n{STOPPED}", file=sys.stderr, flush=True)
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
