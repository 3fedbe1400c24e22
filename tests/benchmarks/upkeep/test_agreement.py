"""A remade record is compared to the bit on its record's machine, and within a part of its intervals elsewhere."""

from __future__ import annotations

import dataclasses
import math

import pytest

from benchmarks.suite.record import Value
from benchmarks.upkeep.agreement import OF_INTERVAL, allowed, compare

HERE = {
    "system": "Linux x86_64",
    "cpu": "one",
    "instructions": "AVX512",
    "gpu": None,
    "python": "3.11.7",
    "versions": {"torch": "2.15.0"},
}
ELSEWHERE = HERE | {"versions": {"torch": "2.11.0"}}


@pytest.fixture
def committed(make_record):
    return make_record(environment=HERE, inputs={"images": "ab" * 32})


def moved(record, by, **changes):
    old = record.metrics["kid_fp"]
    new = old.value + by
    value = dataclasses.replace(old, value=new, low=min(old.low, new), high=max(old.high, new))
    return dataclasses.replace(record, metrics=record.metrics | {"kid_fp": value}, **changes)


def test_equal_records_are_identical_wherever_they_were_made(committed):
    assert compare(committed, committed).verdict == "identical"
    assert compare(committed, dataclasses.replace(committed, environment=ELSEWHERE)).verdict == "identical"


def test_on_the_records_machine_the_last_digit_counts(committed):
    value = committed.metrics["kid_fp"].value
    found = compare(committed, moved(committed, math.nextafter(value, 1) - value))
    assert found.verdict == "differs"
    assert found.lines == (f"kid_fp (value): committed {value!r}, this run {math.nextafter(value, 1)!r}",)


def test_on_the_records_machine_the_images_count(committed):
    found = compare(committed, dataclasses.replace(committed, inputs={"images": "cd" * 32}))
    assert found.verdict == "differs" and found.lines[0].startswith("images: committed abab")


def test_elsewhere_a_metric_may_differ_by_a_part_of_its_interval(committed):
    most = allowed(committed.metrics["kid_fp"], images=512)
    assert most == pytest.approx(OF_INTERVAL * 0.01)
    inside, outside = (moved(committed, share * most, environment=ELSEWHERE) for share in (0.9, 1.1))
    assert compare(committed, inside).verdict == "agrees"
    assert compare(committed, inside).text == "agrees, 0.9 of what is allowed"
    found = compare(committed, outside)
    assert found.verdict == "differs" and found.lines[0].startswith("kid_fp: committed 0.02 (n 512), this run 0.0")


def test_an_interval_over_more_images_than_the_cell_has_is_widened():
    """Of recall, which counts the data's images: shares of 7,572 and of 96 have intervals as their square roots."""
    wide, narrow = Value(0.358, 0.347, 0.369, 7572), Value(0.358, 0.262, 0.454, 96)
    assert allowed(wide, 96) == pytest.approx(allowed(narrow, 96), rel=0.05)


@pytest.mark.parametrize("instructions", ["AVX2", None])
def test_a_processor_of_the_same_name_with_other_instructions_is_elsewhere(committed, instructions):
    other = moved(committed, 1e-9, environment=HERE | {"instructions": instructions})
    assert compare(committed, other).verdict == "agrees"


def test_elsewhere_counts_and_layers_have_to_be_the_same(committed):
    fewer = committed.metrics | {"fd_data": Value(12.5, 12.0, 13.0, 511)}
    found = compare(committed, dataclasses.replace(committed, metrics=fewer, environment=ELSEWHERE))
    assert found.verdict == "differs" and "n 511" in found.lines[0]
    other = dataclasses.replace(committed, coverage={"layers": {"conv2d w4a8": 3}}, environment=ELSEWHERE)
    assert compare(committed, other).lines == ("layers: committed None, this run {'conv2d w4a8': 3}",)


def test_a_metric_that_is_missing_on_either_side_is_named(committed):
    fewer = {"fd_data": committed.metrics["fd_data"]}
    assert compare(committed, dataclasses.replace(committed, metrics=fewer)).lines == ("kid_fp: not in this run",)
    assert compare(dataclasses.replace(committed, metrics=fewer), committed).lines == ("kid_fp: not committed",)


def test_other_settings_are_named_before_any_number(committed, task_settings):
    other = dataclasses.replace(
        moved(committed, 0.5), settings={"task": task_settings | {"steps": 50}, "method": {"batch": 8}}, task_version=2
    )
    assert compare(committed, other).lines == (
        "task version: committed 1, now 2",
        "task setting steps: committed 20, now 50",
        "method setting batch: committed None, now 8",
    )


def test_without_a_committed_record_there_is_nothing_to_compare(committed):
    assert compare(None, committed).verdict == "no committed record"
