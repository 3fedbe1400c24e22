"""What a long run shows: a line for each finished cell, and below them what is being made and the time left."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence

from tqdm import tqdm

from benchmarks.metrics import metrics
from benchmarks.report.tables.markdown import cells_table
from benchmarks.runtime import files
from benchmarks.suite.params import Suite
from benchmarks.suite.record import Cell, Record
from benchmarks.upkeep.agreement import Agreement, compare
from benchmarks.upkeep.clock import spoken

# The metric that a cell is shown with, the first of these that its record has; one that the heading does not name is
# named in the cell's line.
SHOWN = {"feature_distance": "", "fd_data": "Frechet distance to data; "}
# The columns of a table that is printed when all its cells are there.
COLUMNS = ("feature_distance", "noise_error", "temporal_error")
# Of what differs, so many lines are shown for a cell.
DIFFERENCES = 3
HEADER = (
    f"{'':>7}  {'':44} {'feature distance':>19}\n{'done':>7}  {'cell':44} {'committed':>10} {'this run':>10}  verdict"
)


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
        self._unchanged: dict[Cell, Record] = {}
        self._status = tqdm(bar_format="{desc}", file=sys.stdout, disable=None, leave=False)

    def write(self, text: str) -> None:
        """Print a line above the status."""
        self._status.write(text, file=sys.stdout)
        sys.stdout.flush()

    def status(self, making: Sequence[str], left: float) -> None:
        """Show what is being made and about how many seconds are left; nothing where the output is no terminal."""
        shown = f"{self.done} of {self.total} cells done, about {spoken(left)} left; making {', '.join(making)}"
        self._status.set_description_str(shown)

    def begin(self, name: str, left: float) -> None:
        """Show what all processes make together now, where the output is no terminal as a line of its own."""
        if self._status.disable:
            self.write(f"{'':>9}{name} (about {spoken(left)} left)")
        self.status([name], left)

    def skip(self, cells: Iterable[Cell]) -> None:
        """Count cells that are there already."""
        for cell in cells:
            self.done += 1
            if cell in self.committed:
                self._unchanged[cell] = self.committed[cell]

    def show(self, cell: Cell, left: float) -> None:
        """Print a cell that is finished, and any table that has all its cells now."""
        record = Record.load(files.record_file(cell))
        committed = self.committed.get(cell)
        self.made[cell], self.agreements[cell] = record, compare(committed, record)
        self.done += 1
        metric = next((name for name in SHOWN if name in record.metrics), None)
        values = [_value(committed, metric), _value(record, metric)]
        time = "" if self.done == self.total else f" (about {spoken(left)} left)"
        words = f"{SHOWN.get(metric, '')}{self.agreements[cell].text}{time}"
        self.write(f"{self.done:>3}/{self.total:<3}  {cell.name:44} {values[0]:>10} {values[1]:>10}  {words}")
        lines = self.agreements[cell].lines
        more = [f"and {len(lines) - DIFFERENCES} more"] if len(lines) > DIFFERENCES else []
        for line in [*lines[:DIFFERENCES], *more]:
            self.write(f"{'':>9}{line}")
        for table in self.suite.tables:
            wanted = [other for other in self.suite.measured(table) if other.task == cell.task]
            known = self._unchanged | self.made
            if cell in wanted and all(other in known for other in wanted):
                self._show_table(table, cell.task, [known[other] for other in wanted])

    def close(self) -> None:
        """Take the status line away."""
        self._status.close()

    def _show_table(self, table: str, task: str, records: list[Record]) -> None:
        columns = {name: metric for name, metric in metrics().items() if name in COLUMNS}
        text = cells_table(records, columns, intervals=(), cost=True, rank=False)
        self.write(f"\nTable {table} of {task}, from this run:\n\n{text}\n")
        if self.done < self.total:
            self.write(HEADER)


def _value(record: Record | None, metric: str | None) -> str:
    if record is None:
        return "–"
    if metric in record.metrics:
        return f"{record.metrics[metric].value:.4f}"
    return "n/a" if record.status == "not applicable" else record.status
