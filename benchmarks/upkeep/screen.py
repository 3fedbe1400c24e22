"""What a long run shows: a line for each finished cell, and below them what is being made and the time left."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from tqdm import tqdm

from benchmarks.metrics import metrics
from benchmarks.params import Suite
from benchmarks.record import Cell, Record
from benchmarks.stages import files
from benchmarks.tables.markdown import cells_table
from benchmarks.upkeep.agreement import Agreement, compare
from benchmarks.upkeep.clock import spoken

# The metric that a cell is shown with: the first of these that its record has.
SHOWN = {"feature_distance": "", "fd_data": "distance to data; "}
# The columns of a table that is printed when all its cells are there.
COLUMNS = ("feature_distance", "noise_error", "temporal_error")
HEADER = f"{'done':>7}  {'cell':44} {'committed':>10} {'remade':>10}"


class Screen:
    """Finished cells, compared with their committed records, above a status line that a terminal rewrites.

    ``total`` is the number of cells to make, and ``committed`` are the records from before.

    Attributes:
        done: cells that are finished, or were before.
        made: the record of each cell that was shown.
        agreements: how each compares with its committed record.
    """

    def __init__(self, suite: Suite, committed: Mapping[Cell, Record], total: int) -> None:
        self.suite, self.committed, self.total = suite, committed, total
        self.done = 0
        self.made: dict[Cell, Record] = {}
        self.agreements: dict[Cell, Agreement] = {}
        self._status = tqdm(bar_format="{desc}", file=sys.stdout, disable=None, leave=False)

    def write(self, text: str) -> None:
        """Print a line above the status."""
        self._status.write(text, file=sys.stdout)
        sys.stdout.flush()

    def status(self, making: Sequence[str], left: float) -> None:
        """Show what is being made and about how many seconds are left."""
        shown = f"{self.done} of {self.total} cells done, about {spoken(left)} left; making {', '.join(making)}"
        self._status.set_description_str(shown)

    def show(self, cell: Cell, left: float) -> None:
        """Print a cell that is finished, and any table that has all its cells now."""
        record = Record.from_json(files.record_file(cell).read_text(encoding="utf-8"))
        committed = self.committed.get(cell)
        self.made[cell], self.agreements[cell] = record, compare(committed, record)
        self.done += 1
        metric = next((name for name in SHOWN if name in record.metrics), None)
        values = [_value(committed, metric), _value(record, metric)]
        time = "" if self.done == self.total else f" (about {spoken(left)} left)"
        words = f"{SHOWN.get(metric, '')}{self.agreements[cell].verdict}{time}"
        self.write(f"{self.done:>3}/{self.total:<3}  {cell.name:44} {values[0]:>10} {values[1]:>10}  {words}")
        for line in self.agreements[cell].lines:
            self.write(f"{'':>9}{line}")
        for table in self.suite.tables:
            wanted = [other for other in self.suite.measured(table) if other.task == cell.task]
            if cell in wanted and all(other in self.made for other in wanted):
                self._show_table(table, cell.task, [self.made[other] for other in wanted])

    def close(self) -> None:
        """Take the status line away."""
        self._status.close()

    def _show_table(self, table: str, task: str, records: list[Record]) -> None:
        columns = {name: metric for name, metric in metrics().items() if name in COLUMNS}
        text = cells_table(records, columns, intervals=(), cost=True, rank=False)
        self.write(f"\nTable {table} of {task}, made anew:\n\n{text}\n")
        if self.done < self.total:
            self.write(HEADER)


def _value(record: Record | None, metric: str | None) -> str:
    if record is None:
        return "–"
    return f"{record.metrics[metric].value:.4f}" if metric in record.metrics else record.status[:10]
