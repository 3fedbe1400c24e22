"""Rows whose images are known: how far each is from full precision, in all metrics alike."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.metrics import metrics
from benchmarks.report.judge import judges_of
from benchmarks.suite.record import Value

IMAGES, BATCH = 48, 32


class Rows:
    """Records of rows, and the values of their images.

    The logarithm of an image's amplitude is that of its row, and a part that all rows of a task share; rows with
    ``noise`` have a part of their own. Over the images that have a noise error, parts have the mean 0.
    """

    def __init__(self, make_record, settings):
        self.make_record, self.settings = make_record, settings
        self.records, self.values = [], {}

    def add(self, row, level, noise=0.0, temporal=None, task="emoji-ldm4", **changes):
        method, *others = row.split("-")
        changes |= {"protocol": others[0]} if others else {}
        shared, own = _images(0), _images(len(self.records) + 1)
        amplitude = np.exp(level + 0.3 * shared + noise * own)
        values = {
            "feature_distance": amplitude**2,
            "perceptual": amplitude**2,
            "psnr": -20 * np.log10(amplitude),
            "noise_error": amplitude[:BATCH],
        }
        measured = {name: Value(*3 * [float(found.mean())], len(found)) for name, found in values.items()}
        if temporal is not None:
            measured["temporal_error"] = Value(temporal, temporal, temporal, 20)
        settings = {"task": self.settings | {"name": task}, "method": {}}
        record = self.make_record(method=method, metrics=measured, task=task, settings=settings, **changes)
        self.records.append(record)
        self.values[record.cell] = values

    @property
    def judges(self):
        return judges_of(self.records, self.values, metrics())


def _images(seed):
    found = np.random.default_rng(seed).normal(size=IMAGES)
    return found - found[:BATCH].mean()


@pytest.fixture
def rows(make_record, task_settings):
    return Rows(make_record, task_settings)
