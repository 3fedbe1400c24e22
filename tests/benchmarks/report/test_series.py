"""What DVC shows is what the records say: means over whole tables, and series of one column a method."""

import dataclasses
import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks.report import series
from benchmarks.suite import params
from benchmarks.suite.record import Value


@pytest.fixture
def suite(task_settings):
    del task_settings["name"]
    table = {"protocol": "shared", "tasks": ["a", "b"], "precisions": ["w8a8", "w4a8"], "methods": ["nearest", "tfmq"]}
    document = {
        "name": "small",
        "tasks": {"a": task_settings, "b": task_settings},
        "tables": {"leaderboard": table, "published": table | {"protocol": "published", "methods": ["tfmq"]}},
        "methods": {"nearest": {}, "tfmq": {}},
        "temporal": {"tasks": ["b"], "precisions": ["w4a8"], "images": 4},
    }
    return params.parse(document)


def test_a_row_has_its_mean_over_all_tasks_of_a_table_and_no_other(suite, make_record):
    def record(task: str, value: float, **changes: object):
        return make_record(task=task, metrics={"feature_distance": Value(value, value, value, 8)}, **changes)

    absent = record("b", 0.0, method="tfmq", precision="w8a8")
    measured = {
        "leaderboard": [
            record("a", 0.25),
            record("b", 0.75),
            record("b", 9.0, seed=1),
            record("a", 0.5, precision="w8a8"),
            dataclasses.replace(absent, status="failed", reason="out of memory", metrics={}),
        ],
        "published": [record(task, 2.0, method="tfmq", protocol="published") for task in "ab"],
    }
    found = series.metrics(suite, measured)
    assert found == {
        "leaderboard/nearest": {"feature_distance": {"w4a8": 0.5}},
        "published/tfmq": {"feature_distance": {"w4a8": 2.0}},
    }
    assert series.bars(found) == {"leaderboard-w4a8.csv": "method,feature_distance\nnearest,0.5\n"}


def test_a_curve_has_a_column_for_each_method_and_a_line_for_each_step():
    timesteps = np.array([901, 601, 601, 1])
    found = series.errors("a", timesteps, {"nearest": np.array([0.4, 0.2, 0.2, 0.1])})
    assert found == {"a-temporal-error.csv": "timestep,nearest\n901,0.4\n601,0.2\n1,0.1\n"}
    row = {"method": "tfmq", "precision": "w4a8", "deviation": {"median": [0.5, 0.25]}}
    other = {"method": "nearest", "precision": "w4a8", "status": "failed"}
    found = series.deviations({"task": "b", "rows": [other, row, row | {"precision": "w8a8"}]}, ["nearest", "tfmq"])
    frame = pd.read_csv(io.StringIO(found["b-deviation.csv"]))
    assert frame["evaluation"].tolist() == [1, 2] and frame["tfmq"].tolist() == [0.5, 0.25]
    assert frame["nearest"].isna().all()


def test_every_series_is_drawn(suite):
    plots = series.definitions(suite, Path("results/plots"))
    drawn = {file: columns for plot in plots for each in plot.values() for file, columns in each["y"].items()}
    assert drawn == {
        "results/plots/leaderboard-w8a8.csv": "method",
        "results/plots/leaderboard-w4a8.csv": "method",
        "results/plots/a-temporal-error.csv": ["nearest", "tfmq"],
        "results/plots/b-temporal-error.csv": ["nearest", "tfmq"],
        "results/plots/b-deviation.csv": ["nearest", "tfmq"],
    }
    assert len({title for plot in plots for title in plot}) == len(plots) == 5
