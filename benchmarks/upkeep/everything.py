"""`dvc repro` of everything, with progress: cells done of all, the time left, and each table when its rows are there.

Works in this checkout: it writes results/, and skips what DVC finds unchanged. Stopped, it goes on where it was when it
is started again. Exit code 1 if a cell fails; cells that differ from the records that were there before are named.
"""

from __future__ import annotations

import argparse
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from benchmarks.suite.record import FULL_PRECISION

if TYPE_CHECKING:
    from benchmarks.suite.params import Suite
    from benchmarks.suite.record import Cell, Record
    from benchmarks.upkeep.clock import Clock
    from benchmarks.upkeep.screen import Screen

INTERRUPTED = 130
REPRO = (sys.executable, "-m", "dvc", "repro")
RUNNING = re.compile(r"Running stage '(.+)':")
UNCHANGED = re.compile(r"Stage '(.+)' (?:didn't change|is cached|is frozen)")
# Of its warnings, that a run before this one was stopped is none to a reader.
FAILED = re.compile(r"ERROR:|error:|WARNING:(?!.*RWLock)")
# Of what a stage has printed, this is shown where it fails.
LAST_LINES = 12
# Seconds in which one process has started and loaded what it needs, and those of tables and figures.
START_SECONDS = 8.0
TABLES_SECONDS = 60.0
STOP_SECONDS = 1.0


def main(arguments: list[str] | None = None) -> int:
    """Command line; see the module's text."""
    signal.signal(signal.SIGINT, lambda signum, frame: _stop(None))
    argparse.ArgumentParser(prog="python -m benchmarks.upkeep.everything", description=__doc__).parse_args(arguments)
    try:
        return run()
    except ValueError as error:
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
    from benchmarks.upkeep.reproduce import read_records
    from benchmarks.upkeep.screen import HEADER, Screen

    suite = params.load(Path("params.yaml"))
    params.check_methods(suite)
    committed = read_records(suite)
    shards = workers.default_shards(device_of(os.environ.get("TFMQ_BENCH_DEVICE", "auto")))
    clock = Clock(expected(suite, committed, shards), 1)
    screen = Screen(suite, committed, len(suite.cells()))
    screen.write(
        f"`dvc repro`: {screen.total} cells, about {spoken(clock.left())} if none is there yet. It writes results/.\n\n"
        f"{HEADER}"
    )
    failed = _follow([*REPRO, "--keep-going", "--single-item", "--glob", *in_order(suite)], suite, clock, screen) != 0
    if failed:
        _follow([*REPRO, "--single-item", "tables"], suite, clock, screen)
    screen.close()
    print(f"\n{tables.region(Path('README.md').read_text(encoding='utf-8')).strip()}\n")
    print("All tables and figures: results/README.md")
    differing = [cell.name for cell, agreement in screen.agreements.items() if agreement.verdict == "differs"]
    print(f"{len(screen.agreements)} cells made anew in {spoken(clock.elapsed)}, {len(differing)} differ from before.")
    if differing:
        print(f"These differ from the records that were here: {', '.join(differing)}")
    if failed:
        print("some cells failed; they are named above", file=sys.stderr)
    return int(failed)


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
    return {name: seconds + START_SECONDS for name, seconds in stages.items()}


def in_order(suite: Suite) -> list[str]:
    """Patterns of all stages in an order in which each comes after what it needs.

    DVC keeps it where stages are single items; its own order, which differs from run to run, scores hardly a cell
    before most are made. Here tasks follow one another, and each row is made and then scored.
    """
    patterns = {}
    for task in suite.tasks:
        rows = (
            _stages(suite, cell)[0] for cell in suite.cells() if cell.task == task and cell.method != FULL_PRECISION
        )
        patterns |= dict.fromkeys([f"*@{task}", *(f"*{row.removeprefix('generate')}" for row in rows)])
    return [*patterns, "tables"]


def _stages(suite: Suite, cell: Cell) -> tuple[str, str]:
    """The stages of dvc.yaml that generate and score a cell."""
    if cell.method == FULL_PRECISION:
        return f"full_precision@{cell.task}", f"score_full_precision@{cell.task}"
    table = next(name for name in suite.tables if cell in suite.measured(name))
    return f"generate_{table}@{cell.task}-{cell.method}", f"score_{table}@{cell.task}-{cell.method}"


def _follow(command: Iterable[str], suite: Suite, clock: Clock, screen: Screen) -> int:
    """Run DVC and show what it does; returns its exit code."""
    from benchmarks.runtime import files

    scored: dict[str, list[Cell]] = {}
    for cell in suite.cells():
        scored.setdefault(_stages(suite, cell)[1], []).append(cell)
    # In a session of its own, so that Ctrl-C reaches this process alone, which then ends all of them.
    process = subprocess.Popen(
        [*command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    signal.signal(signal.SIGINT, lambda signum, frame: _stop(process))
    current: str | None = None
    printed: deque[str] = deque(maxlen=LAST_LINES)

    def finish() -> None:
        if current is not None:
            clock.finish(current)
            for cell in scored.get(current, []):
                if files.record_file(cell).exists():  # else its stage failed
                    screen.show(cell, clock.left())

    for line in _lines(process):
        if found := RUNNING.match(line):
            finish()
            printed.clear()
            current = found[1]
            clock.start(current)
        elif found := UNCHANGED.match(line):
            finish()
            current = None
            clock.drop(found[1])
            screen.done += len(scored.get(found[1], []))
        elif FAILED.match(line):
            screen.write("\n".join([*printed, line]))
            printed.clear()
        elif line:
            printed.append(line)
        if current is not None:
            screen.status([current], clock.left())
    finish()
    return process.wait()


def _lines(process: subprocess.Popen[str]) -> Iterator[str]:
    """The lines that a process prints, and an empty one every second, until it ends."""
    found: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        for line in process.stdout:
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


def _stop(process: subprocess.Popen[str] | None) -> NoReturn:
    """Ctrl-C: end DVC, its stage and its workers at once, with one line."""
    if process is not None:
        for kind in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, kind)
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
    print("\nstopped; what is finished is kept, and the same command goes on from there", file=sys.stderr, flush=True)
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
