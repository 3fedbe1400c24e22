"""A record that is valid, to change one thing at a time."""

import dataclasses
from collections.abc import Callable

import pytest

from benchmarks.suite.record import Cost, Record, Value

TASK = {
    "name": "emoji-ldm4",
    "version": 1,
    "family": "ldm",
    "checkpoint": "data/emoji-ldm4",
    "dataset": "emoji",
    "data": "data/emoji",
    "resolution": 32,
    "scheduler": "ddim",
    "steps": 20,
    "eta": 0.0,
    "guidance_scale": 1.0,
    "images": 512,
    "batch": 32,
    "calibration_images": 64,
    "reference_images": 4096,
    "evaluator": "efficientnet_lite0",
}


@pytest.fixture
def task_settings() -> dict[str, object]:
    return dict(TASK)


@pytest.fixture
def make_record() -> Callable[..., Record]:
    def make(kid: tuple[float, float, float] | None = (0.02, 0.01, 0.03), **changes: object) -> Record:
        metrics = {"fd_data": Value(12.5, 12.0, 13.0, 512)}
        if kid is not None:
            metrics["kid_fp"] = Value(*kid, 512)
        record = Record(
            task="emoji-ldm4",
            task_version=1,
            method="nearest",
            precision="w4a8",
            seed=0,
            protocol="shared",
            settings={"task": dict(TASK), "method": {}},
            status="measured",
            reason="",
            metrics=metrics,
            cost=Cost(
                "cpu", {"calibrate": 5.0, "block reconstruction": 20.0, "sample": 100.0}, 300.0, 1280, 0, 1.5, 9.75
            ),
            coverage={},
            details={},
            inputs={"data/emoji-ldm4": "ab" * 32},
            environment={"python": "3.11.7"},
        )
        return dataclasses.replace(record, **changes)

    return make
