"""What every method keeps to, whichever it is and whatever the kind of model."""

from __future__ import annotations

import copy
import dataclasses
import json
from functools import cache

import pytest
import torch
from torch import nn

from benchmarks.suite import discover
from tests.tfmq import networks
from tfmq.checkpoint import load_quantized, save_quantized
from tfmq.network.backbone import backbone_of
from tfmq.network.sampling import predict_noise
from tfmq.plan import SHARED, activation_quantizers
from tfmq.precision import FULL, Precision
from tfmq.quantization import quantize_

METHODS = discover.names(discover.METHODS)
PUBLISHED = [name for name in METHODS if discover.method(name).published is not None]
CASES = [("unconditional", precision) for precision in ("w8a8", "w4a32", "w4a8", "w4a4")]
CASES += [("class", "w4a8"), ("text", "w4a8")]


def small(method):
    """The method's settings with few iterations and rows."""
    default = method.config()
    most = {f.name: 2 for f in dataclasses.fields(default) if f.name.endswith("iterations")}
    most |= {f.name: 64 for f in dataclasses.fields(default) if f.name == "rows"}
    most |= {f.name: 1 for f in dataclasses.fields(default) if f.name == "rounds"}
    return dataclasses.replace(default, **{name: min(limit, getattr(default, name)) for name, limit in most.items()})


def usual(name):
    """The precision at which most methods are tested, or the one that this method has."""
    objects = discover.method(name).objection
    return next(precision for precision in ("w4a8", "w4a4") if not objects(Precision.parse(precision)))


@cache
def quantized(name, kind, precision, published=False):
    """A quantised tiny network, the full-precision one and the report; None where the method objects."""
    kind, method, precision = networks.KINDS[kind], discover.method(name), Precision.parse(precision)
    protocol = method.published if published else SHARED
    reason = method.objection(precision)
    if reason:
        assert len(reason) > 10
        return None
    unet = kind.build()
    full = copy.deepcopy(unet)
    pool = kind.pool(full)
    before, state = copy.deepcopy(pool.tensors), torch.random.get_rng_state()
    report = quantize_(unet, precision, small(method).recipe(), pool, networks.generator(), protocol)
    assert all(torch.equal(tensor, before[key]) for key, tensor in pool.tensors.items()), "the pool is shared"
    assert torch.equal(torch.random.get_rng_state(), state), "the generator is the only source of randomness"
    return unet, full, report


@pytest.mark.parametrize(("kind", "precision"), CASES)
@pytest.mark.parametrize("name", METHODS)
def test_quantises_every_layer_or_says_why_not(name, kind, precision):
    found = quantized(name, kind, precision)
    if found is None:
        return
    unet, full, report = found
    for row in report.coverage:
        assert row.reason or ((row.weight_bits <= 8 or "product" in row.kind) and row.activation_bits <= 8), row
    covered = {row.path for row in report.coverage}
    layers = {path for path, module in full.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    assert layers - covered <= set(backbone_of(full).temporal), "only temporal layers can be dropped for a cache"
    assert all(quantizer.enabled for quantizer in activation_quantizers(unet).values())
    assert set(report.seconds) == {step.name for step in small(discover.method(name)).recipe()}
    assert json.loads(json.dumps(report.details, allow_nan=False)) == report.details
    x, step, conditioning = networks.noise(2), torch.tensor(401), networks.KINDS[kind].conditioning(2)
    with torch.no_grad():
        expected, found = (predict_noise(u, x, step, conditioning, 1.0) for u in (full, unet))
    error = (found - expected).norm() / expected.norm()
    assert 0 < error < 1, "a prediction of no noise would be closer"


@pytest.mark.parametrize("kind", ["unconditional", "class"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_its_own_protocol_leaves_out_what_it_names(name, kind):
    protocol = discover.method(name).published
    found = quantized(name, kind, "w4a8", published=True)
    assert found is not None and protocol.name == "published"
    unet, full, report = found
    roles = backbone_of(full).roles
    rows = {row.path: row for row in report.coverage if "product" not in row.kind}
    for role, bits in protocol.bits.items():
        for path in roles[role]:
            if path in rows:
                assert rows[path].weight_bits >= bits and rows[path].activation_bits >= bits, path
                assert rows[path].reason or bits < FULL
    assert torch.isfinite(networks.KINDS[kind].draw(unet)).all()


@pytest.mark.parametrize("name", METHODS)
def test_is_repeated_exactly(name):
    first, _, _ = quantized(name, "text", usual(name))
    again, _, _ = quantized.__wrapped__(name, "text", usual(name))
    draw = networks.KINDS["text"].draw
    assert torch.equal(draw(again), draw(first))


@pytest.mark.parametrize("kind", networks.KINDS)
@pytest.mark.parametrize("name", METHODS)
def test_survives_its_checkpoint(name, kind, tmp_path):
    draw = networks.KINDS[kind].draw
    unet, _, _ = quantized(name, kind, usual(name))
    images = draw(unet)
    assert torch.isfinite(images).all()
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


def test_a_later_setting_is_in_records_only_off_its_default():
    config = discover.method("recommended").config
    plain, wide = config().described(), config(range_margin=0.2).described()
    assert "range_margin" not in plain and plain["range_images"] == 128, "records from before the setting stay valid"
    assert wide == plain | {"range_margin": 0.2}
