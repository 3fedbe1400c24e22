"""TDQ's two rows: what they leave behind is a quantised network with tables, and no networks."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from baselines import tdq, tdq_qat
from tests.tfmq import networks
from tfmq.checkpoint import load_quantized, save_quantized
from tfmq.network.calibration import collect_calibration
from tfmq.network.sampling import Conditioning, SamplingSettings, predict_noise
from tfmq.passes import predicted_step_sizes
from tfmq.passes.step_network import StepNetworks
from tfmq.plan import SHARED, activation_quantizers
from tfmq.precision import Precision
from tfmq.quantization import quantize_

FEW = {"rows": 20, "values": 8, "fit_iterations": 3}
ROWS = {
    "tdq": (tdq.METHOD, tdq.METHOD.config(**FEW)),
    "tdq_qat": (tdq_qat.METHOD, tdq_qat.METHOD.config(**FEW, iterations=2, batch=4)),
}


def quantized(name, build=networks.unconditional, precision="w4a4", protocol=SHARED):
    _, config = ROWS[name]
    unet = build()
    pool = networks.pool(copy.deepcopy(unet))
    report = quantize_(unet, Precision.parse(precision), config.recipe(), pool, networks.generator(), protocol)
    return unet, pool, report


@pytest.mark.parametrize("name", ROWS)
@torch.no_grad()
def test_sampling_needs_tables_alone_and_a_checkpoint_keeps_them(name, tmp_path):
    unet, pool, report = quantized(name)
    assert not any(isinstance(module, StepNetworks) for module in unet.modules())
    for path, quantizer in activation_quantizers(unet).items():
        assert quantizer.enabled and len(quantizer.scale) == pool.steps and not quantizer._forward_pre_hooks, path
    assert report.cost.unet_evaluations == 20 + (8 if name == "tdq_qat" else 0)
    assert report.cost.optimizer_steps == 3 + (2 if name == "tdq_qat" else 0)
    save_quantized(unet, tmp_path / "q.safetensors", {})
    loaded = load_quantized(tmp_path / "q.safetensors")
    x, steps = networks.noise(), torch.tensor([801, 1, 401, 201])
    assert torch.equal(loaded(x, steps).sample, unet(x, steps).sample)


@pytest.mark.parametrize("name", ROWS)
def test_published_layers_are_what_the_authors_quantise(name):
    method, _ = ROWS[name]
    _, _, report = quantized(name, precision="w8a8", protocol=method.published)
    full = {row.path for row in report.coverage if row.weight_bits == 32 and "product" not in row.kind}
    assert {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"} < full
    assert all(path.endswith("time_emb_proj") for path in full if path.count(".") > 1)


@pytest.mark.parametrize("name", ROWS)
def test_tables_are_the_networks_at_each_time_step_of_a_schedule_that_repeats_one(name, monkeypatch):
    seen, tabulate = {}, predicted_step_sizes.tabulate

    def record(made, quantizers, encodings):
        tabulate(made, quantizers, encodings)
        seen.update(networks=made, quantizers=quantizers)

    monkeypatch.setattr(predicted_step_sizes, "tabulate", record)
    kind, (_, config) = networks.KINDS["text"], ROWS[name]
    unet = kind.build()
    pool = kind.pool(unet)
    quantize_(unet, Precision.parse("w4a4"), config.recipe(), pool, networks.generator())
    with torch.no_grad():
        assert {len(quantizer.scale) for quantizer in seen["quantizers"].values()} == {5}
        for timestep in pool.timesteps:
            unet.step_tracker.set(timestep)
            expected = seen["networks"](unet.time_proj(timestep[None]))[:, 0]
            for position, quantizer in enumerate(seen["quantizers"].values()):
                torch.testing.assert_close(quantizer.scale[unet.step_tracker.index], expected[position])


@pytest.mark.parametrize("name", ROWS)
def test_a_guided_pool_serves_as_well(name):
    _, config = ROWS[name]
    unet = networks.conditional()
    generator = networks.generator()
    conditioning = Conditioning(*(torch.randn(2, 4, 5, 12, generator=generator)))
    settings = SamplingSettings(steps=5, guidance_scale=3.0)
    pool = collect_calibration(
        unet, networks.scheduler(), networks.noise(), settings, batch=4, conditioning=conditioning
    )
    report = quantize_(unet, Precision.parse("w8a8"), config.recipe(), pool, generator)
    assert report.cost.unet_evaluations == 40 + (8 if name == "tdq_qat" else 0)
    with torch.no_grad():
        predicted = predict_noise(unet, pool.latents[2], pool.timesteps[2], conditioning, 3.0)
    assert (predicted - pool.noise[2]).norm() < 0.6 * pool.noise[2].norm()


def test_nothing_is_left_without_quantised_activations():
    for method, _ in ROWS.values():
        assert "without quantised activations" in method.objection(Precision.parse("w4a32"))
        assert not method.objection(Precision.parse("w4a4"))


def test_fitting_brings_the_output_nearer_to_full_precision():
    _, config = ROWS["tdq"]
    full = networks.unconditional()
    pool = networks.pool(full)
    errors = []
    for iterations in (0, 100):
        unet = copy.deepcopy(full)
        setting = dataclasses.replace(config, rows=40, values=32, fit_batch=20, fit_iterations=iterations)
        quantize_(unet, Precision.parse("w8a4"), setting.recipe(), pool, networks.generator())
        with torch.no_grad():
            predicted = [unet(x, t).sample for x, t in zip(pool.latents, pool.timesteps, strict=True)]
        errors.append((torch.stack(predicted) - pool.noise).norm())
    assert errors[1] < 0.8 * errors[0]
