"""The time left follows what was expected and what finished work took."""

from __future__ import annotations

import pytest

from benchmarks.suite.record import Cell
from benchmarks.upkeep import clock
from benchmarks.upkeep.clock import Clock


class Time:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_what_is_left_is_shared_by_the_processes_and_what_was_spent_counts():
    time = Time()
    found = Clock({"a": 100.0, "b": 150.0, "c": 150.0}, processes=2, now=time)
    assert found.left() == 200.0
    found.start("b")
    time.now += 50
    assert found.left() == (100 + 100 + 150) / 2 and found.elapsed == 50


def test_no_number_of_processes_ends_before_the_longest_piece():
    assert Clock({"a": 10.0, "b": 100.0}, processes=16, now=Time()).left() == 100.0


def test_one_factor_corrects_all_that_is_left():
    time = Time()
    found = Clock(dict.fromkeys("abc", 1000.0), processes=1, now=time)
    found.start("a")
    time.now += 2000
    found.finish("a")
    assert found.factor == pytest.approx(2, rel=0.03)
    assert found.takes("b") == 1000 * found.factor
    assert found.left() == 2 * found.takes("b")
    found.drop("b")
    assert found.left() == found.takes("c")


def test_work_that_processes_share_counts_for_each_of_them():
    time = Time()
    found = Clock({"shared": 1000.0, "rest": 600.0}, processes=2, now=time)
    found.start("shared")
    time.now += 500
    found.finish("shared", processes=2)
    assert found.factor == 1 and found.left() == 600


def test_work_that_was_done_before_corrects_nothing():
    found = Clock({"a": 10.0, "b": 10.0}, processes=1, now=Time())
    found.finish("a")
    assert found.factor == 1 and found.left() == 10


def test_costs_come_from_the_records(make_record):
    record = make_record()
    seen = 512 * clock.SECONDS_AN_IMAGE + clock.SECONDS_A_CELL
    assert clock.of_cell(record, typical=1.0) == 120.0 + seen  # without recording the calibration pool
    assert clock.of_cell(None, typical=1.0) == 1.0
    assert clock.typical_cell([record]) == 120.0 + seen
    not_applicable = make_record(status="not applicable", reason="x", metrics={}, cost=None)
    assert clock.of_cell(not_applicable, typical=1.0) == 0.0
    assert clock.of_pools({record.cell: record, Cell("other", "m", "w4a8"): record}, "emoji-ldm4", 3) == 15.0


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "5 s"), (42, "40 s"), (56, "1 min"), (400, "7 min"), (3599, "1 h 00 min")]
)
def test_durations_are_rounded_as_people_do(seconds, words):
    assert clock.spoken(seconds) == words
