"""Read `params.yaml`, which says what is measured, into frozen settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from benchmarks.runtime.text import read_yaml
from benchmarks.suite import discover
from benchmarks.suite.fields import read
from benchmarks.suite.record import FULL_PRECISION, SHARED, SIMULATED, Cell
from benchmarks.suite.sections import TABLES, Deployment, ManyImages, Reported, Rounds, Study, Table, Temporal
from benchmarks.suite.tasks import Task


@dataclass(frozen=True)
class Suite:
    """All cells of a benchmark: those of its tables and one full-precision cell a task.

    Attributes:
        methods: by name, the settings that differ from a method's defaults.
        overrides: those that a method has on one task alone, ``{method: {task: {iterations: 200}}}``.
        gates: bounds of metrics of a task's full-precision row, ``{task: {fd_data: [low, high]}}``. Where it is
            outside, all cells of the task are shown as unverified.
        equal_within: rows whose errors are shown to differ by less than this share are as good as equal, and a gain
            that is shown to be less is little or none; with 0, neither is said.
        reported: which numbers of papers stand beside the suite's.
        deployment: what of it is executed, and timed.
        study: how error falls with the time that quantising takes.
        temporal: what quantisation does to the signal of the time step.
        rounds: how many images verdicts take; without it, each cell is drawn at once.
        many_images: metrics of many images that the ranking is put beside.
    """

    name: str
    tasks: dict[str, Task]
    tables: dict[str, Table]
    methods: dict[str, dict[str, object]]
    overrides: dict[str, dict[str, dict[str, object]]] = field(default_factory=dict)
    gates: dict[str, dict[str, tuple[float, ...]]] = field(default_factory=dict)
    equal_within: float = 0.0
    reported: Reported | None = None
    deployment: Deployment | None = None
    study: Study | None = None
    temporal: Temporal | None = None
    rounds: Rounds | None = None
    many_images: ManyImages | None = None

    def __post_init__(self) -> None:
        if FULL_PRECISION in self.methods:
            raise ValueError(f"methods has {FULL_PRECISION}: the full-precision row is always there, remove it")
        if not 0 <= self.equal_within < 1:
            raise ValueError(
                f"equal_within is {self.equal_within}, but must be at least 0 and below 1, such as 0.05 for 5 %"
            )
        for name in ("reported", "deployment", "study", "temporal", "many_images"):
            found = getattr(self, name)
            for task in found.tasks if found else ():
                if task not in self.tasks:
                    raise discover.unknown(f"task in {name}", task, self.tasks, "Tasks stand above.")
        if self.deployment is not None and self.deployment.method not in self.methods:
            advice = "Those under `methods` are meant."
            raise discover.unknown("method in deployment", self.deployment.method, self.methods, advice)
        for task, counts in self.rounds.images.items() if self.rounds else ():
            if task not in self.tasks:
                raise discover.unknown("task in rounds.images", task, self.tasks, "Tasks stand above.")
            _check_rounds(self.tasks[task], counts)
        for task, bounds in self.gates.items():
            if task not in self.tasks:
                raise discover.unknown("task in gates", task, self.tasks, "Gates are of the tasks above them.")
            for metric, ends in bounds.items():
                if len(ends) != 2 or ends[0] > ends[1]:
                    raise ValueError(f"gates.{task}.{metric} is {list(ends)}, but must be [low, high]")
        for name, table in self.tables.items():
            if name not in TABLES:
                raise discover.unknown("table", name, TABLES, "Choose among them.")
            for task in table.tasks:
                if task not in self.tasks:
                    raise discover.unknown(f"task in tables.{name}", task, self.tasks, "Tasks stand in params.yaml.")
            for method in (*table.methods, *table.beside):
                if method not in self.methods:
                    advice = f"Add `{method}: {{}}` under methods, or the settings that differ from its defaults."
                    raise discover.unknown(f"method in tables.{name}", method, self.methods, advice)
        for method, by_task in self.overrides.items():
            if method not in self.methods:
                raise discover.unknown("method in overrides", method, self.methods, "Methods stand above.")
            for task in by_task:
                if task not in self.tasks:
                    raise discover.unknown(f"task in overrides.{method}", task, self.tasks, "Tasks stand above.")
        cells = self.cells()
        if len(set(cells)) < len(cells):
            twice = next(cell for cell in cells if cells.count(cell) > 1)
            raise ValueError(f"two tables measure {twice.name}: list the method under `beside` in one of them")
        for name in self.tables:
            for cell in self.beside(name):
                if cell not in cells:
                    raise ValueError(f"tables.{name} shows {cell.name} beside its own, but no table measures it")

    @property
    def pools(self) -> int:
        """Calibration pools of each task: as many as any table has calibration seeds."""
        return max((count for table in self.tables.values() for count in table.seeds.values()), default=1)

    def settings(self, task: str, method: str) -> dict[str, object]:
        """The settings of a method on a task that differ from its defaults."""
        return self.methods.get(method, {}) | self.overrides.get(method, {}).get(task, {})

    def cells(self) -> list[Cell]:
        """Every cell: the full-precision ones, then table by table."""
        full = [Cell(task, FULL_PRECISION, "w32a32") for task in self.tasks]
        return full + [cell for name in self.tables for cell in self.measured(name)]

    def measured(self, table: str) -> list[Cell]:
        """The cells that a table measures, row by row."""
        found = self.tables[table]
        return self._cells(table, found.methods, found.protocol, found.backend)

    def beside(self, table: str) -> list[Cell]:
        """The cells that a table shows and another one measures, row by row."""
        return self._cells(table, self.tables[table].beside, SHARED, SIMULATED)

    def temporal_cells(self, task: str) -> list[Cell]:
        """The quantised cells of a task whose temporal features are looked at, table by table."""
        precisions = self.temporal.precisions if self.temporal else ()
        return [
            cell
            for cell in self.cells()
            if cell == Cell(task, cell.method, cell.precision) and cell.precision in precisions
        ]

    def _cells(self, table: str, methods: tuple[str, ...], protocol: str, backend: str) -> list[Cell]:
        found = self.tables[table]
        return [
            Cell(task, method, precision, seed, protocol, backend)
            for task, method, precision in product(found.tasks, methods, found.precisions)
            for seed in found.seeds_of(precision)
        ]


def _check_rounds(task: Task, counts: tuple[int, ...]) -> None:
    """Raise ValueError for rounds that a task's images do not fall into."""
    if counts[-1] > task.images:
        raise ValueError(
            f"rounds.images.{task.name} ends at {counts[-1]}, but the task has {task.images} images at most"
        )
    for count in counts:
        if count % task.batch and count != task.images:
            raise ValueError(
                f"rounds.images.{task.name} has {count}: give multiples of the task's batch, {task.batch}, so that a"
                " later round leaves the images of an earlier one as they are"
            )


def parse(document: object) -> Suite:
    """The suite that a parsed `params.yaml` describes.

    Raises ValueError for unknown or missing keys, values of a wrong type or range, and names of methods, families or
    evaluators that have no file; the message names the nearest one.
    """
    if isinstance(document, dict) and isinstance(document.get("tasks"), dict):
        tasks = {name: _named(name, task) for name, task in document["tasks"].items()}
        document = document | {"tasks": tasks}
    suite = read(Suite, document, "params")
    for task in suite.tasks.values():
        _check(discover.FAMILIES, "family", task.family)
        for evaluator in filter(None, (task.evaluator, task.second_evaluator)):
            _check(discover.EXTRACTORS, "evaluator", evaluator)
        if task.dataset is not None:
            _check(discover.DATASETS, "dataset", task.dataset)
    studied = suite.study.curves.values() if suite.study else ()
    for method in (*suite.methods, *(curve.method for curve in studied)):
        _check(discover.METHODS, "method", method)
    return suite


def load(path: Path) -> Suite:
    """Read the suite from a YAML file; raises ValueError if it is missing or no YAML, and as `parse` does."""
    if not path.is_file():
        raise ValueError(f"there is no {path} in {Path.cwd()}: run from the repository's root")
    return parse(read_yaml(path))


def check_methods(suite: Suite) -> None:
    """Raise ValueError for settings that a method does not have, naming the nearest one. Imports every method."""
    for name, settings in suite.methods.items():
        read(discover.method(name).config, settings, f"methods.{name}")
    for name, by_task in suite.overrides.items():
        for task, settings in by_task.items():
            read(discover.method(name).config, settings, f"overrides.{name}.{task}")
    for label, curve in suite.study.curves.items() if suite.study else ():
        for varied in curve.points or ({},):
            read(discover.method(curve.method).config, curve.settings | varied, f"study.curves.{label}")


def _named(name: str, task: object) -> object:
    return {"name": name} | task if isinstance(task, dict) else task


def _check(package: str, kind: str, name: str) -> None:
    if name not in discover.names(package):
        folder = package.replace(".", "/")
        raise discover.unknown(kind, name, discover.names(package), f"A file {folder}/{name}.py would add it.")
