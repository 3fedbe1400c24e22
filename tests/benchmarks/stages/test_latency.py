"""A network is executed by every engine, and what each takes and costs stands on the page."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from benchmarks.latency.engines import engines
from benchmarks.latency.timing import Interval, named
from benchmarks.stages import latency
from benchmarks.suite import params
from tests.tfmq import networks
from tests.tfmq.export.kernels import SATURATES

pytest.importorskip("openvino")

DEPLOYMENT = {
    "tasks": ["toy"],
    "method": "tfmq",
    "precisions": ["w8a8"],
    "images": 4,
    "batch": 2,
    "threads": 1,
    "rounds": 1,
    "evaluations": 2,
}
SLOW = ["openvino-w32a32", "nncf-w8a8"]


@pytest.fixture
def deployed(suite):
    """The tiny suite, which says what is executed."""
    settings = yaml.safe_load(Path("params.yaml").read_text())
    Path("params.yaml").write_text(yaml.safe_dump(settings | {"deployment": DEPLOYMENT}, sort_keys=False))
    return suite


def test_a_task_is_executed_and_compared_with_full_precision_and_simulation(deployed, run):
    missing = [engine.name for engine in engines(["w8a8"]) if engine.objection]  # torch's, on a processor without VNNI
    assert run("latency", "--task", "toy", "--without", *SLOW, *missing) == (0, [])
    found = json.loads(Path("results/latency/toy.json").read_text())
    rows = {row["engine"]: row for row in found["rows"]}
    assert set(rows) == {"torch-w32a32", "openvinointegers-w8a8", "torchintegers-w8a8"} - set(missing)
    full, exported, *executed = (rows[name] for name in rows)
    assert full["error"] == 0 and full["times_faster"]["torch-w32a32"]["value"] == 1
    assert exported["integer_kernels"]["integer"] == exported["integer_kernels"]["all"] > 40
    for row in (exported, *executed):
        assert row["error"] > 0 and row["executed_to_simulated"] > 0
        assert SATURATES or (row["error"] < 0.2 and row["executed_to_simulated"] < row["simulated_error"])
        assert row["size_mib"] < full["size_mib"] and row["seconds"]["value"] > 0
        low, high = row["difference"]["low"], row["difference"]["high"]
        assert low <= row["feature_distance"]["value"] - row["simulated_feature_distance"]["value"] <= high
    page = Path("results/DEPLOYMENT.md").read_text()
    assert "## toy" in page and "OpenVINO, integers" in page
    assert not list(Path("work").glob(".latency-*")), "nothing is left behind"


def test_without_a_checkpoint_weights_are_random(deployed, run, monkeypatch):
    settings = {**networks.unconditional().config}
    monkeypatch.setattr(latency, "describe", lambda task: SimpleNamespace(unet=settings, tokens=1))
    monkeypatch.setattr(latency, "timesteps_of", lambda task, described: torch.tensor([801, 401, 1]))
    monkeypatch.setattr(latency, "build", lambda *given: networks.unconditional())
    document = yaml.safe_load(Path("params.yaml").read_text())
    document["tasks"]["toy"]["checkpoint"] = "data/none"
    Path("params.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    assert run("latency", "--task", "toy", "--without", *SLOW, "torchintegers-w8a8") == (0, [])
    found = json.loads(Path("results/latency/toy.json").read_text())
    assert found["weights"] == "random" and "error" not in found["rows"][1]
    assert "Random weights" in Path("results/DEPLOYMENT.md").read_text()


def test_mistakes_are_one_line_each(deployed, run, root):
    code, (line,) = run("latency", "--task", "toy", "--without", "nncf")
    assert code == 1 and "unknown engine 'nncf': did you mean 'nncf-w8a8'" in line
    for wrong, text in (
        ({"images": 3}, "deployment.images is 3: give a multiple of batch, 2"),
        ({"precisions": ["w4a32"]}, "deployment.precisions has w4a32, whose activations no integer kernel takes"),
        ({"tasks": ["toi"]}, "did you mean 'toy'"),
        ({"method": "tfqm"}, "did you mean 'tfmq'"),
        ({"rounds": 0}, "deployment.rounds is 0, but must be at least 1"),
    ):
        document = yaml.safe_load((deployed / "params.yaml").read_text())
        with pytest.raises(ValueError, match=text):
            params.parse(document | {"deployment": DEPLOYMENT | wrong})


def test_another_processor_is_one_line_that_says_what_to_leave_out(deployed, run, monkeypatch):
    monkeypatch.setattr("tfmq.execution.cpu_is_exact", lambda: False)
    code, (line,) = run("latency", "--task", "toy")
    assert code == 1 and "VNNI instructions are missing" in line
    assert line.endswith("To measure the others: --without torchintegers-w8a8")
    assert not Path("results/latency").exists()


def test_engines_have_names_of_their_own_and_are_found_by_them():
    all_of_them = engines(["w8a8", "w4a8"])
    assert len({engine.name for engine in all_of_them}) == len(all_of_them)
    assert [named(engine.name) for engine in all_of_them] == all_of_them


def test_the_interval_of_a_median_is_that_of_order_statistics():
    assert Interval.of([3.0, 1.0, 2.0]) == Interval(2.0, 1.0, 3.0)
    # Of 40 values the 95 % interval is from the 14th to the 27th (tables of the sign test).
    assert Interval.of([float(i) for i in range(40, 0, -1)]) == Interval(20.5, 14.0, 27.0)
    # Of ten, the second and the ninth: 1 of 1024 has none below the median, 11 at most one, which is 1.07 %.
    assert Interval.of([float(i) for i in range(10)]) == Interval(4.5, 1.0, 8.0)
