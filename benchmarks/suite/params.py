"""Read `params.yaml`, which says what is measured, into frozen settings."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path

from benchmarks.runtime.text import read_yaml
from benchmarks.suite import discover
from benchmarks.suite.fields import read
from benchmarks.suite.record import BACKENDS, FULL_PRECISION, PROTOCOLS, SHARED, SIMULATED, Cell
from tfmq.precision import Precision

TABLES = ("leaderboard", "newer", "ablation", "published", "as_run", "deployed")
SCHEDULERS = ("ddim", "ddim_quad", "pndm", "euler")
# Those that take eta; steps of the others add no noise.
WITH_ETA = ("ddim", "ddim_quad")
SPENDINGS = ("pocock", "obrien_fleming")
# Images of full precision that are drawn in float32 too, where TF32 draws them.
CHECKED = 256


@dataclass(frozen=True)
class Task:
    """A checkpoint, how to sample from it, and how the samples are scored.

    Paths are relative to the suite's folder.

    Attributes:
        version: goes up with every change that moves numbers; results of different versions are never compared.
        family: a file of `benchmarks/models`, which loads the ``checkpoint``.
        checkpoint: folder of the full-precision model.
        resolution: pixels a side of the images.
        scheduler: ``ddim``; ``ddim_quad``, whose time steps have evenly spaced square roots up to that of 800;
            ``pndm``, which evaluates the network once more, twice at the second time step; or ``euler``.
        steps: denoising steps.
        eta: share of the noise that a DDIM step adds, from 0 (deterministic) to 1.
        guidance_scale: of classifier-free guidance; 1 for none.
        images: scored for each cell.
        batch: images sampled at once; part of the task, since rounding differs between batch sizes.
        calibration_images: of a calibration pool.
        reference_images: full-precision samples that give the distribution to compare with; 0 for none.
        evaluator: a file of `benchmarks/features`, which sees all images.
        dataset: a file of `benchmarks/datasets`, which reads ``data``.
        data: folder of the real images that samples are compared with.
        data_images: how many of them, from the first; None for all.
        statistics: published moments of a data set; with ``data`` too, images are compared with these moments and the
            features of ``data``.
        second_evaluator: gives one more distance to the data.
        prompts: folder with ``calibration.txt`` and ``evaluation.txt``, a prompt a line; None without conditioning.
        clip: folders of the CLIPs that score how well images match their prompts.
        tf32: whether a GPU may draw the images of full precision in TF32, as PyTorch's convolutions are by default. All
            else is in float32: calibration, quantised networks, the trajectory that their errors are measured along,
            reference samples, and what is drawn in rounds. A device without TF32 draws in float32.
    """

    name: str
    version: int
    family: str
    checkpoint: str
    resolution: int
    scheduler: str
    steps: int
    eta: float
    guidance_scale: float
    images: int
    batch: int
    calibration_images: int
    reference_images: int
    evaluator: str
    dataset: str | None = None
    data: str | None = None
    data_images: int | None = None
    statistics: str | None = None
    second_evaluator: str | None = None
    prompts: str | None = None
    clip: tuple[str, ...] = ()
    tf32: bool = False

    @property
    def checked_batches(self) -> int:
        """How many batches of full precision are drawn in float32 too, where TF32 draws them: the first ones."""
        return -(-min(CHECKED, self.images) // self.batch)

    def described(self) -> dict[str, object]:
        """The fields, as records hold them: `tf32` only where it is true, so that records from before it stay valid."""
        return {name: value for name, value in asdict(self).items() if name != "tf32" or value}

    def __post_init__(self) -> None:
        counts = ("images", "batch", "calibration_images", "data_images")
        for name in ("version", "resolution", "steps", *counts):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"task {self.name}: {name} is {value}, but must be at least 1")
        if self.reference_images < 0:
            raise ValueError(f"task {self.name}: reference_images is {self.reference_images}, but must be at least 0")
        if (self.dataset is None) != (self.data is None):
            raise ValueError(f"task {self.name}: give dataset and data together: what reads it, and where it lies")
        if self.data is None and self.statistics is None:
            raise ValueError(f"task {self.name}: give dataset and data, or statistics, to compare images with")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"task {self.name}: eta is {self.eta}, but must be from 0 (deterministic) to 1")
        if self.scheduler not in SCHEDULERS:
            raise discover.unknown(f"scheduler of task {self.name}", self.scheduler, SCHEDULERS, "Choose one of them.")
        if self.guidance_scale < 0:
            raise ValueError(f"task {self.name}: guidance_scale is {self.guidance_scale}, but must be at least 0")
        if self.eta > 0 and self.scheduler not in WITH_ETA:
            raise ValueError(f"task {self.name}: eta is {self.eta}, but {self.scheduler} adds no noise: give 0")
        if self.prompts is None:
            if self.clip:
                raise ValueError(f"task {self.name}: clip scores how images match prompts, but there are no prompts")
            if self.guidance_scale != 1:
                raise ValueError(
                    f"task {self.name}: guidance_scale is {self.guidance_scale}, but without prompts only 1"
                )


@dataclass(frozen=True)
class Table:
    """Cells that are measured and shown together: every task with every method at every precision.

    The full-precision row is always there.

    Attributes:
        protocol: which layers are quantised.
        tasks, precisions, methods: what is measured.
        beside: methods that another table measures, simulated under the shared protocol, and this one shows too.
        seeds: how many calibration seeds the cells of a precision are measured with; other precisions have one, seed 0.
        backend: computes the quantised networks.
    """

    protocol: str
    tasks: tuple[str, ...]
    precisions: tuple[str, ...]
    methods: tuple[str, ...]
    beside: tuple[str, ...] = ()
    seeds: dict[str, int] = field(default_factory=dict)
    backend: str = SIMULATED

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise discover.unknown("protocol", self.protocol, PROTOCOLS, "Choose one of them.")
        if self.backend not in BACKENDS:
            raise discover.unknown("backend", self.backend, BACKENDS, "Choose one of them.")
        for axis in ("tasks", "precisions", "methods"):
            values = getattr(self, axis)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{axis} of a table is {list(values)}: give at least one, each once")
        for precision in self.precisions:
            if Precision.parse(precision).is_full:
                raise ValueError(f"precisions has {precision}: the full-precision row is always there, remove it")
        for precision, count in self.seeds.items():
            if precision not in self.precisions:
                raise discover.unknown(
                    "precision in seeds", precision, self.precisions, "Those of the table are meant."
                )
            if count < 1:
                raise ValueError(f"seeds of {precision} is {count}, but must be at least 1")

    def seeds_of(self, precision: str) -> range:
        """The calibration seeds of the cells at a precision."""
        return range(self.seeds.get(precision, 1))


@dataclass(frozen=True)
class Reported:
    """Which numbers of papers stand beside a suite's own, and how far these may be from them.

    What the papers report of full precision is a gate like those of `Suite.gates`.

    Attributes:
        tasks: the names that the numbers of a task go by in `baselines/reported.csv`.
        tolerances: the largest difference from a reported number that counts as none, of a metric or of ``size_mib``,
            the size of the network.
    """

    tasks: dict[str, tuple[str, ...]]
    tolerances: dict[str, float]

    def __post_init__(self) -> None:
        for metric, tolerance in self.tolerances.items():
            if tolerance < 0:
                raise ValueError(f"reported.tolerances.{metric} is {tolerance}, but must be at least 0")


@dataclass(frozen=True)
class Deployment:
    """How executed networks are measured: `python -m benchmarks latency`.

    Attributes:
        tasks: whose networks are executed.
        method: quantises them, under the protocol `deployable`.
        precisions: of weights and activations.
        images: sampled by every engine, and compared with full precision.
        batch: rows of one evaluation; under guidance twice the images.
        threads: of each timed process.
        rounds: turns of each engine.
        evaluations: timed in each turn.
    """

    tasks: tuple[str, ...]
    method: str
    precisions: tuple[str, ...]
    images: int
    batch: int
    threads: int
    rounds: int
    evaluations: int

    def __post_init__(self) -> None:
        for name in ("images", "batch", "threads", "rounds", "evaluations"):
            if getattr(self, name) < 1:
                raise ValueError(f"deployment.{name} is {getattr(self, name)}, but must be at least 1")
        if self.images % self.batch:
            raise ValueError(f"deployment.images is {self.images}: give a multiple of batch, {self.batch}")
        for precision in self.precisions:
            if not Precision.parse(precision).quantizes_activations:
                raise ValueError(f"deployment.precisions has {precision}, whose activations no integer kernel takes")


@dataclass(frozen=True)
class Curve:
    """One line of a study: a method with some of its settings varied.

    Attributes:
        method: what quantises; it need not be in a table.
        settings: that differ from those of the suite, at all points.
        points: settings that differ from point to point; none is one point.
        protocol: which layers are quantised, and on which grids.
        tasks, precisions: where it is measured; none means those of the study.
        seeds: whether it is measured on each calibration seed of the study, or on the first alone.
    """

    method: str
    settings: dict[str, object] = field(default_factory=dict)
    points: tuple[dict[str, object], ...] = ()
    protocol: str = SHARED
    tasks: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    seeds: bool = True

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise discover.unknown("protocol", self.protocol, PROTOCOLS, "Choose one of them.")


@dataclass(frozen=True)
class Study:
    """How error falls with time: `python -m benchmarks study`.

    Attributes:
        tasks: whose networks are quantised.
        precisions: of weights and activations.
        seeds: calibration seeds.
        images: that errors are means over, of noise that nothing else uses.
        curves: by their labels.
    """

    tasks: tuple[str, ...]
    precisions: tuple[str, ...]
    seeds: int
    images: int
    curves: dict[str, Curve]

    def __post_init__(self) -> None:
        for name in ("seeds", "images"):
            if getattr(self, name) < 1:
                raise ValueError(f"study.{name} is {getattr(self, name)}, but must be at least 1")
        for label, curve in self.curves.items():
            for task in curve.tasks:
                if task not in self.tasks:
                    where = f"task in study.curves.{label}"
                    raise discover.unknown(where, task, self.tasks, "Those of the study are meant.")
        for precision in (*self.precisions, *(each for curve in self.curves.values() for each in curve.precisions)):
            Precision.parse(precision)


@dataclass(frozen=True)
class Temporal:
    """What quantisation does to the signal of the time step: `python -m benchmarks temporal`.

    Attributes:
        tasks: whose quantised networks are looked at: all that are simulated under the shared protocol, of seed 0.
        precisions: of weights and activations.
        images: whose latents are followed.
    """

    tasks: tuple[str, ...]
    precisions: tuple[str, ...]
    images: int

    def __post_init__(self) -> None:
        if self.images < 2:
            raise ValueError(f"temporal.images is {self.images}, but must be at least 2 for an interval over images")
        for precision in self.precisions:
            Precision.parse(precision)


@dataclass(frozen=True)
class Rounds:
    """How many images verdicts take: `python -m benchmarks rounds`.

    A cell of a task is drawn in rounds. It ends after the one in which every claim that it has a part in is decided.

    Attributes:
        images: by task, how many images a cell has after each round; what the last one leaves open stays open.
        margin: two rows whose errors are shown to differ by less than this share are as good as equal, and decided;
            with 0, only a difference decides.
        spending: how the level is spent over the rounds, as `benchmarks.report.sequential` has it.
    """

    images: dict[str, tuple[int, ...]]
    margin: float = 0.0
    spending: str = "pocock"

    def __post_init__(self) -> None:
        for task, counts in self.images.items():
            if not counts or not all(a < b for a, b in zip((1, *counts), counts, strict=False)):
                raise ValueError(f"rounds.images.{task} is {list(counts)}: give rising counts of images, each above 1")
        if not 0 <= self.margin < 1:
            raise ValueError(
                f"rounds.margin is {self.margin}, but must be at least 0 and below 1, such as 0.05 for 5 %"
            )
        if self.spending not in SPENDINGS:
            raise discover.unknown("rounds.spending", self.spending, SPENDINGS, "Choose one of them.")


@dataclass(frozen=True)
class Suite:
    """All cells of a benchmark: those of its tables and one full-precision cell a task.

    Attributes:
        methods: by name, the settings that differ from a method's defaults.
        overrides: those that a method has on one task alone, ``{method: {task: {iterations: 200}}}``.
        gates: bounds of metrics of a task's full-precision row, ``{task: {fd_data: [low, high]}}``. Where it is
            outside, all cells of the task are shown as unverified.
        reported: which numbers of papers stand beside the suite's.
        deployment: what of it is executed, and timed.
        study: how error falls with the time that quantising takes.
        temporal: what quantisation does to the signal of the time step.
        rounds: how many images verdicts take; without it, each cell is drawn at once.
    """

    name: str
    tasks: dict[str, Task]
    tables: dict[str, Table]
    methods: dict[str, dict[str, object]]
    overrides: dict[str, dict[str, dict[str, object]]] = field(default_factory=dict)
    gates: dict[str, dict[str, tuple[float, ...]]] = field(default_factory=dict)
    reported: Reported | None = None
    deployment: Deployment | None = None
    study: Study | None = None
    temporal: Temporal | None = None
    rounds: Rounds | None = None

    def __post_init__(self) -> None:
        if FULL_PRECISION in self.methods:
            raise ValueError(f"methods has {FULL_PRECISION}: the full-precision row is always there, remove it")
        for task in self.reported.tasks if self.reported else ():
            if task not in self.tasks:
                raise discover.unknown("task in reported", task, self.tasks, "Tasks stand above.")
        if self.deployment is not None:
            for task in self.deployment.tasks:
                if task not in self.tasks:
                    raise discover.unknown("task in deployment", task, self.tasks, "Tasks stand above.")
            if self.deployment.method not in self.methods:
                advice = "Those under `methods` are meant."
                raise discover.unknown("method in deployment", self.deployment.method, self.methods, advice)
        for task in self.study.tasks if self.study else ():
            if task not in self.tasks:
                raise discover.unknown("task in study", task, self.tasks, "Tasks stand above.")
        for task in self.temporal.tasks if self.temporal else ():
            if task not in self.tasks:
                raise discover.unknown("task in temporal", task, self.tasks, "Tasks stand above.")
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
