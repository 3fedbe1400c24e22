"""How long the paper suite would take on many GPUs: `python -m benchmarks.upkeep.scaling`.

A simulation: the code that starts units (`benchmarks.runtime.workers.do_all`) starts them on GPUs that are not there,
whose clock moves on to the end of the next unit. How long a unit takes is what the suite's plan says
(`results/PLAN.md`): hours on an assumed GPU, without loading, scoring and what the engine itself takes, where what
several cells learn alike counts once. Two ways to run the suite are compared with max(sum of all units / GPUs, longest
unit), which no order can beat:

- *stages*: one stage after the other, as `dvc repro` runs them, a row of a table each;
- *together*: the calibrations of all tasks, then all full-precision cells, then all other cells, as `docs/cluster.md`
  says.
"""

from __future__ import annotations

import argparse
import heapq
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from benchmarks.planning.planner import QUANTIZED
from benchmarks.runtime.workers import do_all
from benchmarks.suite import params
from benchmarks.suite.params import Suite
from benchmarks.suite.record import FULL_PRECISION
from benchmarks.suite.tasks import Task

PAPER = Path(__file__).parents[1] / "paper"
HOUR = 3600.0
GPUS = [8, 64, 512]


@dataclass(frozen=True)
class Unit:
    """Seconds of one GPU, and the units that can begin when it is done."""

    seconds: float
    then: tuple[Unit, ...] = ()

    @property
    def all_seconds(self) -> float:
        """Of this unit and of all that follow it."""
        return self.seconds + sum(unit.all_seconds for unit in self.then)

    @property
    def longest(self) -> float:
        """Seconds of the longest of these units."""
        return max(self.seconds, *(unit.longest for unit in self.then), 0.0)


class SimulatedGPUs:
    """An engine whose units take their time of a clock that is not there.

    Attributes:
        now: seconds since the beginning.
    """

    def __init__(self, gpus: int) -> None:
        self.now = 0.0
        self._gpus, self._started = gpus, 0
        self._ends: list[tuple[float, int]] = []

    def __enter__(self) -> SimulatedGPUs:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def size(self) -> int:
        """See `Engine`."""
        return self._gpus

    def start(self, do: Callable[..., object], unit: Unit) -> int:
        """See `Engine`."""
        self._started += 1
        heapq.heappush(self._ends, (self.now + unit.seconds, self._started))
        return self._started

    def finished(self) -> list[tuple[int, None]]:
        """See `Engine`."""
        self.now, handle = heapq.heappop(self._ends)
        return [(handle, None)]


def makespan(phases: Sequence[Sequence[Unit]], gpus: int) -> float:
    """Seconds until all units are done; a phase begins when the one before it has ended."""
    where = SimulatedGPUs(gpus)
    for phase in phases:
        do_all(phase, print, where, then=lambda unit: unit.then)
    return where.now


def bound(phases: Sequence[Sequence[Unit]], gpus: int) -> float:
    """Seconds that no order of these units can beat."""
    units = [unit for phase in phases for unit in phase]
    return max(sum(unit.all_seconds for unit in units) / gpus, max(unit.longest for unit in units))


@dataclass(frozen=True)
class TaskUnits:
    """The units of a task: its calibration pool, its full-precision batches, and each row's cells."""

    calibration: list[Unit]
    full_precision: list[Unit]
    rows: dict[str, list[Unit]]


def read_plan(page: str, suite: Suite) -> list[TaskUnits]:
    """The units of a suite's tasks, from what `python -m benchmarks plan` wrote; tasks that it lacks are left out."""
    sections = {section.partition("\n")[0].strip(): section for section in page.split("\n## ")}
    planned = [task for task in suite.tasks.values() if task.name in sections]
    return [_units_of(task, _table(sections[task.name])) for task in planned]


def _table(section: str) -> pd.DataFrame:
    lines = [line for line in section.splitlines() if line.startswith("|")]
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    table = pd.DataFrame(rows, columns=head).set_index("Step")[["Sampling", "Hours"]]
    return table.apply(lambda column: pd.to_numeric(column.str.replace(",", ""), errors="coerce")).fillna(0.0)


def _units_of(task: Task, table: pd.DataFrame) -> TaskUnits:
    batches = math.ceil(task.images / task.batch)
    full = table.loc[FULL_PRECISION]
    an_evaluation = full.Hours * HOUR / full.Sampling
    rows: dict[str, list[Unit]] = {}
    for name, step in table.iterrows():
        row, slash, _ = str(name).partition("/")
        if slash and step.Hours:
            sampling = QUANTIZED * an_evaluation * step.Sampling
            # The cell's errors take what a batch does.
            drawn = (Unit(sampling / (batches + 1)),) * (batches + 1)
            rows.setdefault(row, []).append(Unit(max(step.Hours * HOUR - sampling, 0.0), drawn))
    calibration = [Unit(table.loc["calibrate"].Hours * HOUR)]
    return TaskUnits(calibration, [Unit(full.Hours * HOUR / batches)] * batches, rows)


def stages(tasks: Sequence[TaskUnits]) -> list[list[Unit]]:
    """Phases of `dvc repro`."""
    before = [phase for task in tasks for phase in (task.calibration, task.full_precision)]
    return before + [row for task in tasks for row in task.rows.values()]


def together(tasks: Sequence[TaskUnits]) -> list[list[Unit]]:
    """Phases of the same stages, each of all tasks and rows."""
    return [
        [unit for task in tasks for unit in task.calibration],
        [unit for task in tasks for unit in task.full_precision],
        [unit for task in tasks for row in task.rows.values() for unit in row],
    ]


def longest_first(phases: Sequence[Sequence[Unit]]) -> list[list[Unit]]:
    """The same phases, in each of which the longest units come first."""
    return [sorted(phase, key=lambda unit: -unit.seconds) for phase in phases]


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.upkeep.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--gpus", type=_count, nargs="+", default=GPUS, metavar="N", help="how many there are (default: 8, 64 and 512)"
    )
    options = parser.parse_args(arguments)
    page = (PAPER / "results" / "PLAN.md").read_text(encoding="utf-8")
    tasks = read_plan(page, params.load(PAPER / "params.yaml"))
    ways = {"stages": stages(tasks), "together": together(tasks)}
    ways["together, longest first"] = longest_first(ways["together"])
    rows = []
    for gpus in options.gpus:
        least = bound(ways["together"], gpus)
        row = {"GPUs": gpus, "bound (h)": least / HOUR}
        for name, phases in ways.items():
            took = makespan(phases, gpus)
            row |= {f"{name} (h)": took / HOUR, f"over the bound (%), {name}": 100 * (took / least - 1)}
        rows.append(row)
    print(pd.DataFrame(rows).set_index("GPUs").T.to_markdown(floatfmt=",.2f"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
