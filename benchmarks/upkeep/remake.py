"""Reproduce cells in the current folder, compare each with its committed record as it is finished, and show it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from functools import partial
from io import StringIO

import torch

from benchmarks.runtime import files
from benchmarks.runtime.workers import run_units
from benchmarks.stages import calibrate, generate, reference, score
from benchmarks.suite.params import Suite
from benchmarks.suite.record import FULL_PRECISION, Cell, Record
from benchmarks.upkeep import clock
from benchmarks.upkeep.clock import Clock
from benchmarks.upkeep.screen import Screen

# A cell that has to fit into the time is taken to need so much more than expected; and ending takes so many seconds.
MARGIN = 1.2
LAST_SECONDS = 10.0


class Remake:
    """Cells that are reproduced, and what came of them.

    ``cells`` are made in their order, after the full-precision cell of each task. ``committed`` are the records to
    compare with. No quantised cell is begun that would end after ``seconds``, where that is given. What an earlier run
    has finished in the current folder is not made again.

    Attributes:
        screen: shows what is finished, and has the records.
        skipped: cells that did not fit into the time.
        failures: cells that could not be made, each with what was raised.
    """

    def __init__(
        self,
        suite: Suite,
        committed: Mapping[Cell, Record],
        cells: Sequence[Cell],
        device: torch.device,
        shards: int,
        seconds: float | None = None,
    ) -> None:
        self.suite, self.device, self.shards, self.seconds = suite, device, shards, seconds
        self.full = {cell.task: files.full_precision_cell(cell) for cell in cells}
        self.cells = [cell for cell in cells if cell.method != FULL_PRECISION]
        self.skipped: list[Cell] = []
        self.failures: list[tuple[Cell, Exception]] = []
        self.clock = Clock(self._expected(committed), shards)
        self.screen = Screen(suite, committed, len(self.full) + len(self.cells))

    def run(self) -> None:
        """Make them all."""
        torch.set_num_threads(1)
        with redirect_stderr(StringIO()):  # the stages' own progress bars, in this process and in its workers
            for task, full in self.full.items():
                try:
                    self._prepare(task, full)
                except Exception as error:  # the cells of other tasks can do without
                    self.failures.append((full, error))
                    self.cells = [cell for cell in self.cells if cell.task != task]
            do = partial(_make, self.suite, str(self.device))
            self.failures += run_units(self._fitting(), do, self.shards, self.device, self._finish, self._watch)
        self.screen.close()

    def _pools(self, task: str) -> int:
        """Calibration pools that the cells of a task need."""
        return 1 + max((cell.seed for cell in self.cells if cell.task == task), default=0)

    def _expected(self, records: Mapping[Cell, Record]) -> dict[object, float]:
        typical = clock.typical_cell(records.values())
        expected: dict[object, float] = {}
        for task, full in self.full.items():
            expected["pools", task] = clock.of_pools(records, task, self._pools(task))
            expected["reference", task] = clock.of_reference(records, self.suite.tasks[task])
            expected[full] = clock.of_cell(records.get(full), typical)
        return expected | {cell: clock.of_cell(records.get(cell), typical) for cell in self.cells}

    def _prepare(self, task: str, full: Cell) -> None:
        """What the cells of a task need: calibration pools, references, and the full-precision cell."""
        pools = self._pools(task)
        if not (files.calibration(task) / files.pool(pools - 1)).exists():
            with self._piece(("pools", task), f"{task}: calibration data"):
                calibrate.run(_with_pools(self.suite, pools), task, str(self.device), self.shards)
        self.clock.drop(("pools", task))
        if not (files.reference(task) / reference.EVALUATOR).exists():
            with self._piece(("reference", task), f"{task}: features of the data and of reference samples"):
                reference.run(self.suite, task, str(self.device), self.shards)
        self.clock.drop(("reference", task))
        if not files.record_file(full).exists():
            with self._piece(full, full.name):
                for stage in (generate, score):
                    stage.run(self.suite, [full], str(self.device), self.shards)
        self._finish(full)

    @contextmanager
    def _piece(self, piece: object, name: str) -> Iterator[None]:
        """A piece of work that all processes share."""
        self.clock.start(piece)
        self.screen.begin(name, self.clock.left())
        yield
        self.clock.finish(piece, self.shards)

    def _fitting(self) -> Iterator[Cell]:
        """The cells that are left, each when a process is free for it and if it will end in time."""
        for cell in self.cells:
            if files.record_file(cell).exists():
                self._finish(cell)
                continue
            needed = self.clock.takes(cell) * MARGIN + LAST_SECONDS
            if self.seconds is not None and self.clock.elapsed + needed > self.seconds:
                self.skipped.append(cell)
                self.clock.drop(cell)
                self.screen.total -= 1
                continue
            self.clock.start(cell)
            yield cell

    def _watch(self, running: Sequence[Cell]) -> None:
        self.screen.status([cell.name for cell in running], self.clock.left())

    def _finish(self, cell: Cell) -> tuple[Cell, ...]:
        """Show a cell that is there now; no other follows from it."""
        self.clock.finish(cell)
        self.screen.show(cell, self.clock.left())
        return ()


def _with_pools(suite: Suite, pools: int) -> Suite:
    """The suite with so many calibration pools a task, or as few as it has."""
    tables = {
        name: replace(table, seeds={precision: min(count, pools) for precision, count in table.seeds.items()})
        for name, table in suite.tables.items()
    }
    return replace(suite, tables=tables)


def _make(suite: Suite, device: str, cell: Cell) -> None:
    """Make one cell in this process: quantise, sample, score."""
    for stage in (generate, score):
        stage.run(suite, [cell], device, 1)
