"""Two rows of a task compared over all images and calibration seeds that they have in common. Touches no files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np

from benchmarks.metrics import Metric
from benchmarks.report.inference import Borrowed, Estimate, Parts, borrow, estimate, parts_of
from benchmarks.report.statistic import RANKED_BY, Values, logarithm
from benchmarks.suite.record import FULL_PRECISION, Cell, Record


@dataclass(frozen=True)
class Comparison:
    """A row less another one, in logarithms where the measure is an error, so that `exp` of it is a ratio of errors.

    Attributes:
        parts: mean squares of the differences.
        borrowed: what comparisons of the task by this measure have in common.
        estimate: the mean difference; None where nothing says how it varies.
    """

    parts: Parts
    borrowed: Borrowed
    estimate: Estimate | None


class Judge:
    """All measured cells of one task, and what their images have.

    A *measure* is `RANKED_BY` by its name, or a metric. A *row* is named as the folders of records are.
    """

    def __init__(self, records: Sequence[Record], values: Mapping[Cell, Values], metrics: Mapping[str, Metric]) -> None:
        found = [r for r in records if r.status == "measured" and r.method != FULL_PRECISION]
        self.metrics, self.values = metrics, values
        self.records: dict[tuple[str, str], dict[int, Record]] = {}
        for record in sorted(found, key=lambda record: record.seed):
            self.records.setdefault((record.cell.row, record.precision), {})[record.seed] = record
        self._borrowed: dict[tuple[str, bool, str], Borrowed] = {}

    @cached_property
    def precisions(self) -> list[str]:
        """All that any row is measured at."""
        return list(dict.fromkeys(precision for _, precision in self.records))

    def has_seeds(self, precision: str) -> bool:
        """Whether any row is measured with several calibration seeds there."""
        return any(at == precision and len(seeds) > 1 for (_, at), seeds in self.records.items())

    def compare(self, measure: str, row: str, other: str, precision: str) -> Comparison | None:
        """``row`` less ``other``; None where no seed has both by this measure."""
        values, others = (self._of(measure, name, precision) for name in (row, other))
        seeds = [seed for seed in values if seed in others]
        if not seeds:
            return None
        parts = parts_of(_stack([values[seed] for seed in seeds]) - _stack([others[seed] for seed in seeds]))
        borrowed = self.borrowed(measure, True, precision)
        return Comparison(parts, borrowed, estimate(parts, borrowed))

    def is_error(self, measure: str) -> bool:
        """Whether values are logarithms of an error, which a smaller one is better than."""
        return measure == RANKED_BY.name or (self.metrics[measure].paired and self.metrics[measure].better == "lower")

    def mean(self, measure: str, row: str, precision: str) -> float | None:
        """The mean over images and seeds of one row; None where it is not measured."""
        values = self._of(measure, row, precision)
        return float(_stack(list(values.values())).mean()) if values else None

    def level(self, measure: str, row: str, precision: str) -> Estimate | None:
        """The mean of one row by itself; None where it is not measured."""
        values = self._of(measure, row, precision)
        if not values:
            return None
        return estimate(parts_of(_stack(list(values.values()))), self.borrowed(measure, False, precision))

    def joint(self, measure: str, rows: Sequence[str], precision: str) -> tuple[np.ndarray, np.ndarray]:
        """Means (M,) of rows that are measured, by images, and their covariance (M, M).

        Images are the same for all rows; calibrations are taken as each row's own.
        """
        found = [_stack(list(self._of(measure, row, precision).values())) for row in rows]
        parts = [parts_of(values) for values in found]
        by_image = np.array([values.mean(0) for values in found])
        borrowed = self.borrowed(measure, False, precision)
        calibration = [estimate(part, borrowed).error ** 2 - part.between_images / part.images for part in parts]
        covariance = np.atleast_2d(np.cov(by_image)) / by_image.shape[1] + np.diag(calibration)
        return by_image.mean(1), covariance

    def borrowed(self, measure: str, pairs: bool, precision: str) -> Borrowed:
        """What pairs of rows, or rows, have in common at a precision; where its rows have one seed, at all others."""
        key = measure, pairs, precision
        if key not in self._borrowed:
            own = self._borrow(measure, pairs, [precision])
            self._borrowed[key] = own if own.degrees else self._borrow(measure, pairs, self.precisions)
        return self._borrowed[key]

    def _borrow(self, measure: str, pairs: bool, precisions: Sequence[str]) -> Borrowed:
        """Of all rows at these precisions that have as many seeds as most of those with several."""
        rows = {key: self._of(measure, *key) for key in self.records if key[1] in precisions}
        complete = {key: row for key, row in rows.items() if list(row) == list(range(len(row))) and len(row) > 1}
        counts = Counter(map(len, complete.values()))
        most = max(counts, key=lambda count: (counts[count], count), default=0)
        parts: list[Parts] = []
        independent = 0
        for precision in precisions:
            found = [_stack(list(r.values())) for (_, at), r in complete.items() if (at, len(r)) == (precision, most)]
            drawing = sum(parts_of(row).ratio is not None for row in found)
            parts += [parts_of(a - b) for a, b in combinations(found, 2)] if pairs else map(parts_of, found)
            independent += max(drawing - pairs, 0)
        return borrow(parts, independent)

    def _of(self, measure: str, row: str, precision: str) -> dict[int, np.ndarray | float]:
        """What a row has at each seed: (N,) of images, or one number of a metric that has none."""
        found = {}
        for seed, record in self.records.get((row, precision), {}).items():
            value = self._cell(measure, record)
            if value is not None:
                found[seed] = value
        return found

    def _cell(self, measure: str, record: Record) -> np.ndarray | float | None:
        values = self.values.get(record.cell, {})
        if measure == RANKED_BY.name:
            return RANKED_BY.of_images(values, self.metrics)
        metric = self.metrics[measure]
        is_error = self.is_error(measure)
        if metric.per_image is not None:
            found = values.get(measure)
            return found if found is None or not is_error else logarithm(metric, found)
        value = record.metrics.get(measure)
        if value is None:
            return None
        return float(np.log(max(value.value, 10.0**-metric.digits))) if is_error else value.value


def judges_of(
    records: Sequence[Record], values: Mapping[Cell, Values], metrics: Mapping[str, Metric]
) -> dict[str, Judge]:
    """A judge for each task."""
    tasks = dict.fromkeys(record.task for record in records)
    return {task: Judge([r for r in records if r.task == task], values, metrics) for task in tasks}


def _stack(values: Sequence[np.ndarray | float]) -> np.ndarray:
    return np.stack([np.asarray(value, dtype=float) for value in values])
