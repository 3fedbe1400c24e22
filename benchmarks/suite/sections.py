"""The parts of `params.yaml` beside tasks and methods: tables, and what else is measured of the suite."""

from __future__ import annotations

from dataclasses import dataclass, field

from benchmarks.suite import discover
from benchmarks.suite.record import BACKENDS, PROTOCOLS, SHARED, SIMULATED
from tfmq.precision import Precision

TABLES = ("leaderboard", "newer", "ablation", "variants", "published", "as_run", "deployed")
SPENDINGS = ("pocock", "obrien_fleming")


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
        pool: calibration images; none means as many as the task has.
        seeds: whether it is measured on each calibration seed of the study, or on the first alone.
    """

    method: str
    settings: dict[str, object] = field(default_factory=dict)
    points: tuple[dict[str, object], ...] = ()
    protocol: str = SHARED
    tasks: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    pool: int | None = None
    seeds: bool = True

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise discover.unknown("protocol", self.protocol, PROTOCOLS, "Choose one of them.")
        if self.pool is not None and self.pool < 1:
            raise ValueError(f"pool of a curve is {self.pool}, but must be at least 1")


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
class ManyImages:
    """What the ranking is put beside: `python -m benchmarks.upkeep.many_images`.

    Attributes:
        tasks: whose rows of the leaderboard are made anew.
        precision: of these rows, at calibration seed 0.
        images: of each.
    """

    tasks: tuple[str, ...]
    precision: str
    images: int

    def __post_init__(self) -> None:
        Precision.parse(self.precision)
        if self.images < 2:
            raise ValueError(f"many_images.images is {self.images}, but must be at least 2 for distances of sets")


@dataclass(frozen=True)
class Rounds:
    """How many images verdicts take: `python -m benchmarks rounds`.

    A cell of a task is drawn in rounds. It ends after the one in which every claim that it has a part in is decided.

    Attributes:
        images: by task, how many images a cell has after each round; what the last one leaves open stays open.
        spending: how the level is spent over the rounds, as `benchmarks.report.sequential` has it.
    """

    images: dict[str, tuple[int, ...]]
    spending: str = "pocock"

    def __post_init__(self) -> None:
        for task, counts in self.images.items():
            if not counts or not all(a < b for a, b in zip((1, *counts), counts, strict=False)):
                raise ValueError(f"rounds.images.{task} is {list(counts)}: give rising counts of images, each above 1")
        if self.spending not in SPENDINGS:
            raise discover.unknown("rounds.spending", self.spending, SPENDINGS, "Choose one of them.")
