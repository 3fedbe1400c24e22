"""What a method says it will spend is what it reports to have spent."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest

from baselines import ptqd_mixed
from benchmarks.suite import discover
from tests.baselines.test_contract import METHODS, PUBLISHED, quantized, small
from tests.tfmq import networks
from tfmq.network.unet import full_precision_bytes
from tfmq.plan import SHARED
from tfmq.precision import Precision

CASES = [("unconditional", "w4a8"), ("unconditional", "w4a32"), ("class", "w4a8"), ("text", "w4a8")]
W4A8 = Precision.parse("w4a8")
# Which widths it calibrates follows from a measurement, so it can only say how much at most.
AT_MOST = [ptqd_mixed.METHOD.label]


def check(name, kind, precision, published=False):
    found = quantized(name, kind, precision, published)
    if found is None:
        return
    _, full, report = found
    method = discover.method(name)
    protocol = method.published if published else SHARED
    pool = networks.KINDS[kind].pool(full)
    structure = copy.deepcopy(full).to("meta")
    planned = small(method).effort(structure, pool, Precision.parse(precision), protocol)
    evaluations, steps = report.effort.unet_evaluations, report.effort.optimizer_steps
    if method.label in AT_MOST:
        assert evaluations <= planned.unet_evaluations <= 2 * evaluations
        assert steps <= planned.optimizer_steps <= 2 * steps
    else:
        assert (planned.unet_evaluations, planned.optimizer_steps) == (evaluations, steps)
    if planned.learned_rows:
        assert planned.optimizer_steps and planned.learned_rows >= 2


@pytest.mark.parametrize(("kind", "precision"), CASES)
@pytest.mark.parametrize("name", METHODS)
def test_is_planned_exactly(name, kind, precision):
    check(name, kind, precision)


@pytest.mark.parametrize("name", PUBLISHED)
def test_is_planned_exactly_with_its_own_choice_of_layers(name):
    check(name, "unconditional", "w4a8", published=True)


@pytest.mark.parametrize("kind", ["unconditional", "text"])
@pytest.mark.parametrize("name", METHODS)
def test_memory_is_planned_or_said_to_be_unknown(name, kind):
    unet = networks.KINDS[kind].build()
    pool = networks.KINDS[kind].pool(unet)
    held = small(discover.method(name)).memory(unet.to("meta"), pool, W4A8, SHARED)
    if name == "tdq_qat":
        assert held is None
        return
    assert held.memory > 2 * full_precision_bytes(unet) and held.disk == 0


def test_rows_that_are_too_many_wait_on_the_disk():
    unet = networks.unconditional()
    pool = networks.pool(unet)
    config = replace(small(discover.method("tfmq")), memory_gib=1e-6)
    here, there = (
        each.memory(unet.to("meta"), pool, W4A8, SHARED) for each in (replace(config, memory_gib=1.0), config)
    )
    assert there.disk > 0 == here.disk and there.memory + there.disk == here.memory
