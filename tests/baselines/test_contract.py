"""What every method keeps to, whichever it is."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from torch import nn

from benchmarks import discover
from tests.tfmq import networks
from tfmq.checkpoint import load_quantized, save_quantized
from tfmq.correction import correction_of
from tfmq.plan import SHARED, activation_quantizers
from tfmq.precision import FULL, Precision
from tfmq.sampling import sample
from tfmq.unet import UNetLayout

METHODS = discover.names(discover.METHODS)
PUBLISHED = [name for name in METHODS if discover.method(name).published is not None]
PRECISIONS = ("w8a8", "w4a32", "w4a8", "w4a4")


def small(method):
    """The method's settings with few iterations."""
    default = method.config()
    names = [field.name for field in dataclasses.fields(default) if field.name.endswith("iterations")]
    return dataclasses.replace(default, **{name: min(2, getattr(default, name)) for name in names})


def quantized(name, precision, protocol=SHARED):
    """A quantised tiny network, the full-precision one and the report; None where the method objects."""
    method, precision = discover.method(name), Precision.parse(precision)
    reason = method.objection(precision)
    if reason:
        assert len(reason) > 10
        return None
    unet = networks.unconditional()
    full = copy.deepcopy(unet)
    pool = networks.pool(full)
    before, state = copy.deepcopy(pool.tensors), torch.random.get_rng_state()
    report = method.quantize(unet, pool, precision, small(method), networks.generator(), protocol)
    assert all(torch.equal(tensor, before[key]) for key, tensor in pool.tensors.items()), "the pool is shared"
    assert torch.equal(torch.random.get_rng_state(), state), "the generator is the only source of randomness"
    return unet, full, report


def draw(unet):
    """Two samples with the network's correction, as the generate stage draws them."""
    return sample(unet, networks.scheduler(), networks.noise(2), networks.SETTINGS, correction=correction_of(unet))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", METHODS)
def test_quantises_every_layer_or_says_why_not(name, precision):
    found = quantized(name, precision)
    if found is None:
        return
    unet, full, report = found
    for row in report.coverage:
        assert row.reason or ((row.weight_bits <= 8 or "product" in row.kind) and row.activation_bits <= 8), row
    covered = {row.path for row in report.coverage}
    layers = {path for path, module in full.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    assert layers - covered <= set(UNetLayout.of(full).temporal), "only temporal layers can be dropped for a cache"
    assert all(quantizer.enabled for quantizer in activation_quantizers(unet).values())
    assert set(report.seconds) == {"weights", "activations"}
    assert json.loads(json.dumps(report.details, allow_nan=False)) == report.details
    x = networks.noise(2)
    with torch.no_grad():
        error = (unet(x, 401).sample - full(x, 401).sample).norm() / full(x, 401).sample.norm()
    assert 0 < error < 1, "a prediction of no noise would be closer"


@pytest.mark.parametrize("name", PUBLISHED)
def test_its_own_protocol_leaves_out_what_it_names(name):
    protocol = discover.method(name).published
    found = quantized(name, "w4a8", protocol)
    assert found is not None and protocol.name == "published"
    unet, full, report = found
    roles = UNetLayout.of(full).roles
    rows = {row.path: row for row in report.coverage if "product" not in row.kind}
    for role, bits in protocol.bits.items():
        for path in roles[role]:
            if path in rows:
                assert rows[path].weight_bits >= bits and rows[path].activation_bits >= bits, path
                assert rows[path].reason or bits < FULL
    assert torch.isfinite(draw(unet)).all()


@pytest.mark.parametrize("name", METHODS)
def test_is_repeated_exactly_and_survives_its_checkpoint(name, tmp_path):
    unet, _, _ = quantized(name, "w4a8")
    images = draw(unet)
    assert torch.isfinite(images).all()
    again, _, _ = quantized(name, "w4a8")
    assert torch.equal(draw(again), images)
    save_quantized(unet, tmp_path / "quantized.safetensors", {})
    torch.testing.assert_close(draw(load_quantized(tmp_path / "quantized.safetensors")), images, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_has_frozen_settings_label_source_and_a_docstring(name):
    method = discover.method(name)
    assert method.config.__dataclass_params__.frozen and method.config()
    assert method.label and method.source
    assert len(discover.text(discover.METHODS, name)) > 100


def test_labels_are_different():
    labels = [discover.method(name).label for name in METHODS]
    assert len(set(labels)) == len(labels)
