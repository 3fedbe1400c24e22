"""What every method keeps to, whichever it is."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from benchmarks import discover
from tests.tfmq import networks
from tfmq.plan import activation_quantizers
from tfmq.precision import Precision

METHODS = discover.names(discover.METHODS)


def small(method):
    """The method's settings with few iterations."""
    names = [field.name for field in dataclasses.fields(method.config)]
    return method.config(**{name: 2 for name in names if name.endswith("iterations")})


@pytest.mark.parametrize("precision", ["w4a8", "w8a8", "w4a32"])
@pytest.mark.parametrize("name", METHODS)
def test_quantises_every_layer_or_says_why_not(name, precision):
    method, precision = discover.method(name), Precision.parse(precision)
    unet = networks.unconditional()
    full = copy.deepcopy(unet)
    reason = method.objection(precision)
    if reason:
        assert len(reason) > 10
        return
    pool = networks.pool(full)
    before = pool.latents.clone()
    report = method.quantize(unet, pool, precision, small(method), networks.generator())
    assert torch.equal(pool.latents, before)
    for row in report.coverage:
        assert row.reason or (row.weight_bits <= 8 or "product" in row.kind) and row.activation_bits <= 8, row
    assert all(quantizer.enabled for quantizer in activation_quantizers(unet).values())
    assert set(report.seconds) == {"weights", "activations"}
    x = networks.noise(2)
    with torch.no_grad():
        error = (unet(x, 401).sample - full(x, 401).sample).norm() / full(x, 401).sample.norm()
    assert 0 < error < 0.6


@pytest.mark.parametrize("name", METHODS)
def test_has_frozen_settings_label_source_and_a_docstring(name):
    method = discover.method(name)
    assert method.config.__dataclass_params__.frozen and method.config()
    assert method.label and method.source
    assert len(__import__(f"baselines.{name}", fromlist=["x"]).__doc__) > 100
