"""How long making cells takes: from the costs in their records, corrected by how long what is finished took."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Mapping

from benchmarks.suite.params import Suite
from benchmarks.suite.record import FULL_PRECISION, Cell, Record
from benchmarks.suite.tasks import Task

# Of one core of the machine that the committed records are of: an image's features and comparisons, the metrics of a
# cell, and what is loaded for one.
SECONDS_AN_IMAGE = 0.017
SECONDS_A_CELL = 6.0
# Loading a quantised network.
SECONDS_A_NETWORK = 0.5
# Images of a data set whose size is not known before it is read.
DATA_IMAGES = 8_000
# The correction starts as if so many seconds of work had taken as long as expected.
PRIOR_SECONDS = 30.0


class Clock:
    """The time left of some pieces of work, which processes share.

    ``expected`` maps each piece to the seconds that it should take one process. All are corrected by one factor: what
    finished pieces took over what was expected of them.
    """

    def __init__(
        self, expected: Mapping[Hashable, float], processes: int, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.expected = dict(expected)
        self.processes = processes
        self._now = now
        self._began = now()
        self._started: dict[Hashable, float] = {}
        self._left = set(self.expected)
        self._took = self._of = PRIOR_SECONDS

    @property
    def elapsed(self) -> float:
        """Seconds since the clock was made."""
        return self._now() - self._began

    @property
    def factor(self) -> float:
        """What work takes over what was expected."""
        return self._took / self._of

    def start(self, piece: Hashable) -> None:
        """A piece begins; again is the same as once."""
        self._started.setdefault(piece, self._now())

    def finish(self, piece: Hashable, processes: int = 1) -> None:
        """A piece is done, by so many processes together; one that was not started was done before."""
        if piece in self._left and piece in self._started:
            self._took += (self._now() - self._started[piece]) * processes
            self._of += self.expected[piece]
        self._left.discard(piece)

    def drop(self, piece: Hashable) -> None:
        """A piece need not be done."""
        self._left.discard(piece)

    def takes(self, piece: Hashable) -> float:
        """Seconds that one process will need for a piece."""
        return self.expected[piece] * self.factor

    def left(self) -> float:
        """Seconds until all is done."""
        now = self._now()
        spent = {piece: now - self._started.get(piece, now) for piece in self._left}
        rest = [max(self.takes(piece) - spent[piece], 0.0) for piece in self._left]
        return max(sum(rest) / self.processes, max(rest, default=0.0))


def of_cell(record: Record | None, typical: float) -> float:
    """Seconds of one process for a cell, as its committed record has them: quantising, sampling and scoring.

    ``typical`` is for a cell without a record. A cell that its method does not apply to takes none.
    """
    if record is None:
        return typical
    if record.cost is None:
        return 0.0
    phases = sum(seconds for phase, seconds in record.cost.seconds.items() if phase != "calibrate")
    return phases + scoring(record)


def scoring(record: Record) -> float:
    """Seconds of one process for the features and metrics of a cell's images."""
    return 0.0 if record.cost is None else record.settings["task"]["images"] * SECONDS_AN_IMAGE + SECONDS_A_CELL


def typical_cell(records: Iterable[Record]) -> float:
    """Seconds of one process for a cell on the average over some records; a minute where there are none."""
    found = [of_cell(record, 0.0) for record in records if record.cost is not None]
    return sum(found) / len(found) if found else 60.0


def of_pools(records: Mapping[Cell, Record], task: str, pools: int) -> float:
    """Seconds of one process for some calibration pools of a task: its records say what one took."""
    costs = (record.cost for cell, record in records.items() if cell.task == task)
    return pools * max((cost.seconds["calibrate"] for cost in costs if cost is not None), default=10.0)


def of_reference(records: Mapping[Cell, Record], task: Task) -> float:
    """Seconds of one process for what a task's images are compared with.

    Its samples are drawn as those of the full-precision cell; features are extracted of them and of the data.
    """
    sampling = task.reference_images * _sampling_an_image(records, task)
    return sampling + (task.reference_images + DATA_IMAGES) * SECONDS_AN_IMAGE


def of_temporal(records: Mapping[Cell, Record], suite: Suite, task: str) -> float:
    """Seconds of one process for a task's temporal features: images of each quantised network, and of full precision.

    They are drawn as those of the full-precision cell.
    """
    cells, images = suite.temporal_cells(task), suite.temporal.images if suite.temporal else 0
    an_image = _sampling_an_image(records, suite.tasks[task])
    return (len(cells) + 1) * images * an_image + len(cells) * SECONDS_A_NETWORK


def _sampling_an_image(records: Mapping[Cell, Record], task: Task) -> float:
    full = records.get(Cell(task.name, FULL_PRECISION, "w32a32"))
    return 0.1 if full is None or full.cost is None else full.cost.seconds["sample"] / task.images


def spoken(seconds: float) -> str:
    """A duration as people say it: ``40 s``, ``7 min``, ``2 h 05 min``."""
    if seconds < 55:
        return f"{max(round(seconds / 5) * 5, 5)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
