import dataclasses
import json

import pytest

from benchmarks.suite.record import Cell, Cost, Record, Value


def test_a_record_survives_json(make_record):
    record = make_record()
    assert Record.from_json(record.to_json()) == record
    assert json.loads(record.to_json())["schema"] == 2
    without_cost = make_record(kid=None, status="failed", reason="out of memory", metrics={}, cost=None)
    assert Record.from_json(without_cost.to_json()) == without_cost


def test_cell_names_leave_out_the_first_seed():
    assert Cell("emoji-ldm4", "tfmq", "w4a8").name == "emoji-ldm4/tfmq/w4a8"
    assert Cell("emoji-ldm4", "tfmq", "w4a8", 1).name == "emoji-ldm4/tfmq/w4a8-s1"


def test_cell_names_and_records_tell_protocols_apart(make_record):
    assert Cell("emoji-ldm4", "tfmq", "w4a8", protocol="published").name == "emoji-ldm4/tfmq-published/w4a8"
    assert make_record(protocol="published").cell == Cell("emoji-ldm4", "nearest", "w4a8", 0, "published")
    assert make_record(backend="executed").cell == Cell("emoji-ldm4", "nearest", "w4a8", backend="executed")


def test_a_backend_that_there_is_not_is_refused():
    assert Cell("emoji-ldm4", "tfmq", "w4a8").backend == "simulated"
    executed = Cell("emoji-ldm4", "tfmq", "w4a8", 1, "deployable", "executed")
    assert executed.name == "emoji-ldm4/tfmq-deployable-executed/w4a8-s1"
    with pytest.raises(ValueError, match="unknown backend 'simulatd': did you mean 'simulated'"):
        Cell("emoji-ldm4", "tfmq", "w4a8", backend="simulatd")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 1}, "schema 1, this code reads 2"),
        ({"metods": 1}, "unknown key in record 'metods': did you mean 'method'"),
        ({"seed": "0"}, "record.seed is '0': it must be a whole number"),
        ({"status": "measurd"}, "did you mean 'measured'"),
        ({"metrics": {"kid_fp": {"value": 1.0, "low": 0.0, "high": 2.0}}}, "record.metrics.kid_fp lacks n"),
        ({"metrics": {"kid_fp": {"value": 3.0, "low": 0.0, "high": 2.0, "n": 9}}}, "outside its interval"),
        ({"status": "failed"}, "reason"),
    ],
)
def test_json_is_read_strictly(make_record, change, message):
    fields = json.loads(make_record().to_json()) | change
    with pytest.raises(ValueError, match=message):
        Record.from_json(json.dumps(fields))


def test_a_missing_field_is_named(make_record):
    fields = json.loads(make_record().to_json())
    del fields["protocol"]
    with pytest.raises(ValueError, match="record lacks protocol"):
        Record.from_json(json.dumps(fields))
    with pytest.raises(ValueError, match="schema None"):
        Record.from_json("{}")


def test_numbers_must_be_finite(make_record):
    text = make_record().to_json().replace("12.5", "NaN")
    with pytest.raises(ValueError, match="finite"):
        Record.from_json(text)
    with pytest.raises(ValueError, match="JSON"):
        dataclasses.replace(make_record(), settings={"task": {"eta": float("inf")}}).to_json()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reason": "slow"}, "measured cells have none"),
        ({"status": "not applicable", "reason": "no time embedding"}, "has metrics"),
        ({"status": "unverified", "reason": "FP is off", "cost": None}, "needs metrics and a cost"),
    ],
)
def test_status_reason_and_metrics_agree(make_record, change, message):
    with pytest.raises(ValueError, match=message):
        make_record(**change)


def test_quantization_time_is_all_but_sampling():
    cost = Cost("cpu", {"block reconstruction": 2.0, "activation ranges": 1.0, "sample": 50.0}, 1.0, 0, 0, 1.0, 1.0)
    assert cost.quantization_seconds == 3.0
    with pytest.raises(ValueError, match="did you mean 'simulated'"):
        dataclasses.replace(cost, execution="simulate")


def test_a_value_needs_images():
    with pytest.raises(ValueError, match="n is 0"):
        Value(1.0, 1.0, 1.0, 0)
