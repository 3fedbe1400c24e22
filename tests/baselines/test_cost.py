"""What a method is planned to cost is what it reports to have spent, pass by pass."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest

from baselines import ptqd_mixed
from benchmarks.suite import discover
from tests.baselines.test_contract import METHODS, PUBLISHED, quantized, small
from tests.tfmq import networks
from tfmq.cost import plan_cost
from tfmq.network.backbone import full_precision_bytes
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
    recipe = small(method).recipe()
    planned = plan_cost(structure, Precision.parse(precision), recipe, pool, protocol, memory=False)
    evaluations, steps = report.cost.unet_evaluations, report.cost.optimizer_steps
    if method.label in AT_MOST:
        assert evaluations <= planned.cost.unet_evaluations <= 2 * evaluations
        assert steps <= planned.cost.optimizer_steps <= 2 * steps
        exact = [step.name for step in recipe if not isinstance(step, ptqd_mixed.MixedWidths)]
    else:
        assert (planned.cost.unet_evaluations, planned.cost.optimizer_steps) == (evaluations, steps)
        exact = [step.name for step in recipe]
    assert [name for name, _ in planned.costs] == [spent.name for spent in report.passes]
    for (name, cost), spent in zip(planned.costs, report.passes, strict=True):
        if name in exact:
            assert (cost.unet_evaluations, cost.optimizer_steps) == (spent.unet_evaluations, spent.optimizer_steps)
    if planned.cost.learned_rows:
        assert planned.cost.optimizer_steps and planned.cost.learned_rows >= 2


@pytest.mark.parametrize(("kind", "precision"), CASES)
@pytest.mark.parametrize("name", METHODS)
def test_is_planned_exactly(name, kind, precision):
    check(name, kind, precision)


@pytest.mark.parametrize("name", PUBLISHED)
def test_is_planned_exactly_with_its_own_choice_of_layers(name):
    check(name, "unconditional", "w4a8", published=True)


@pytest.mark.parametrize("kind", ["unconditional", "text"])
@pytest.mark.parametrize("name", METHODS)
def test_memory_is_planned(name, kind):
    unet = networks.KINDS[kind].build()
    pool = networks.KINDS[kind].pool(unet)
    planned = plan_cost(unet.to("meta"), W4A8, small(discover.method(name)).recipe(), pool)
    assert planned.held > 2 * full_precision_bytes(unet) and planned.on_disk == 0


def test_rows_that_are_too_many_wait_on_the_disk():
    unet = networks.unconditional()
    pool = networks.pool(unet)
    config = replace(small(discover.method("tfmq")), memory_gib=1e-6)
    here, there = (
        plan_cost(unet.to("meta"), W4A8, each.recipe(), pool) for each in (replace(config, memory_gib=1.0), config)
    )
    assert there.on_disk > 0 == here.on_disk and there.held + there.on_disk == here.held
