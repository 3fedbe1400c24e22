"""What came out of one cell: a Record, kept as one JSON file in `results/records/`."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from benchmarks.suite.discover import unknown
from benchmarks.suite.fields import read

SCHEMA = 2
STATUSES = ("measured", "not applicable", "failed", "unverified")
FULL_PRECISION = "full_precision"
SHARED, *_ = PROTOCOLS = ("shared", "published", "as_run", "deployable")
SIMULATED, *_ = BACKENDS = ("simulated", "executed")


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Attributes:
        task, method: names.
        precision: such as ``w4a8``.
        seed: of the calibration images and of the random numbers of quantising. All seeds are scored on images from
            the same noise, so full precision has seed 0 alone.
        protocol: which layers are quantised: ``shared`` the same ones for every method, ``published`` those of the
            method's own paper, ``as_run`` those that its released code quantises, ``deployable`` those of ``shared`` on
            grids that integer kernels execute.
        backend: computes the quantised network, a file of `benchmarks/backends`: ``simulated`` rounds to low-bit grids
            and computes in float32, ``executed`` computes in integers.
    """

    task: str
    method: str
    precision: str
    seed: int = 0
    protocol: str = SHARED
    backend: str = SIMULATED

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise unknown("backend", self.backend, BACKENDS, "Choose one of them.")

    @property
    def row(self) -> str:
        """The method, with its protocol where that is not the shared one, and its backend where it is not simulated."""
        protocol = "" if self.protocol == SHARED else f"-{self.protocol}"
        backend = "" if self.backend == SIMULATED else f"-{self.backend}"
        return self.method + protocol + backend

    @property
    def name(self) -> str:
        """``emoji-ldm4/tfmq/w4a8``; seeds other than 0 add ``-s1``. Names the cell's files."""
        name = f"{self.task}/{self.row}/{self.precision}"
        return name if self.seed == 0 else f"{name}-s{self.seed}"


@dataclass(frozen=True)
class Value:
    """A measured number with its 95 % interval [low, high] and the count n of images behind it."""

    value: float
    low: float
    high: float
    n: int

    def __post_init__(self) -> None:
        if not self.low <= self.value <= self.high:
            raise ValueError(f"the value {self.value} is outside its interval [{self.low}, {self.high}]")
        if self.n < 1:
            raise ValueError(f"n is {self.n}: a value needs at least one image")


@dataclass(frozen=True)
class Cost:
    """What quantising and sampling took.

    Attributes:
        device: its name.
        seconds: wall time by phase: ``calibrate`` and each pass, by its name, in one process; and ``sample``, summed
            over the processes that share it.
        peak_memory_mib: most memory that the process held.
        unet_evaluations: samples that went through the network while quantising.
        optimizer_steps: of all passes that learn.
        size_mib, full_precision_size_mib: of the network's weights as stored.
        execution: the backend: whether low-bit arithmetic was ``simulated`` by fake quantisation or ``executed`` by
            integer kernels.
    """

    device: str
    seconds: dict[str, float]
    peak_memory_mib: float
    unet_evaluations: int
    optimizer_steps: int
    size_mib: float
    full_precision_size_mib: float
    execution: str = SIMULATED

    def __post_init__(self) -> None:
        if self.execution not in BACKENDS:
            raise unknown("execution", self.execution, BACKENDS, "Name one of them.")

    @property
    def quantization_seconds(self) -> float:
        """Wall time of all phases but sampling."""
        return sum(seconds for phase, seconds in self.seconds.items() if phase != "sample")


@dataclass(frozen=True)
class Record:
    """The outcome of one cell.

    Attributes:
        task, task_version, method, precision, seed, protocol, backend: of the cell.
        settings: ``task`` (`Task.described`) and ``method`` (the resolved settings of the method).
        status: one of STATUSES; ``not applicable`` and ``failed`` have no metrics.
        reason: why the cell is not ``measured``, or an empty text.
        metrics: by name.
        cost: what it took; None where nothing was made.
        coverage: which layers are quantised.
        details: what the method tells of its own choices.
        inputs: SHA-256 of each input.
        environment: versions and processor.
    """

    task: str
    task_version: int
    method: str
    precision: str
    seed: int
    protocol: str
    settings: dict[str, object]
    status: str
    reason: str
    metrics: dict[str, Value]
    cost: Cost | None
    coverage: dict[str, object]
    details: dict[str, object]
    inputs: dict[str, str]
    environment: dict[str, object]
    backend: str = SIMULATED
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise ValueError(
                f"record {self.cell.name} has schema {self.schema!r}, this code reads {SCHEMA}: score the cell again"
            )
        if self.status not in STATUSES:
            raise unknown("status", self.status, STATUSES, "Name one of them.")
        if (self.status == "measured") == bool(self.reason):
            raise ValueError(
                f"record {self.cell.name} is {self.status} with reason {self.reason!r}:"
                " measured cells have none, all others need one"
            )
        if self.status in ("not applicable", "failed") and self.metrics:
            raise ValueError(f"record {self.cell.name} is {self.status} but has metrics: remove them")
        if self.status in ("measured", "unverified") and (not self.metrics or self.cost is None):
            raise ValueError(f"record {self.cell.name} is {self.status}: it needs metrics and a cost")

    @property
    def cell(self) -> Cell:
        """The cell this record is of."""
        return Cell(self.task, self.method, self.precision, self.seed, self.protocol, self.backend)

    def to_json(self) -> str:
        """The record as indented JSON, the schema first. Raises ValueError for numbers that are not finite."""
        fields = dataclasses.asdict(self)
        ordered = {"schema": fields.pop("schema")} | fields
        return json.dumps(ordered, indent=2, allow_nan=False, ensure_ascii=False) + "\n"

    @classmethod
    def load(cls, path: Path) -> Record:
        """Read the file of a record. Raises ValueError, naming it, as `from_json`."""
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def from_json(cls, text: str) -> Record:
        """Read what `to_json` wrote. Raises ValueError for unknown or missing fields, or another schema."""
        try:
            fields = json.loads(text)
        except ValueError as error:
            raise ValueError(f"the record is damaged or half-written ({error}): score the cell again") from None
        if isinstance(fields, dict) and fields.get("schema") != SCHEMA:
            raise ValueError(
                f"the record has schema {fields.get('schema')!r}, this code reads {SCHEMA}: score the cell again"
            )
        return read(cls, fields, "record")
