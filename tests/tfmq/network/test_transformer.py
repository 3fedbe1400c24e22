"""Diffusion transformers: run block by block, the layers that depend on the time step, and every method on them."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import DiTPipeline, DiTTransformer2DModel

from benchmarks.suite import discover
from tests.baselines.test_contract import METHODS, small
from tests.tfmq import networks
from tfmq.checkpoint import load_quantized, save_quantized
from tfmq.cost import plan_cost
from tfmq.network.backbone import backbone_of, evaluate
from tfmq.network.calibration import CalibrationRows, CalibrationSet, collect_calibration
from tfmq.network.offload import BlockStream, Place
from tfmq.network.sampling import Conditioning, SamplingSettings, sample
from tfmq.passes.temporal_cache import TemporalCache
from tfmq.plan import activation_quantizers, quantized_layers
from tfmq.precision import Precision
from tfmq.quantization import quantize_
from tfmq.state import coverage

STEPS, CLASSES = torch.tensor([1, 201, 401, 201]), torch.tensor([0, 3, 10, 1])


def transformer(classes: int = 10) -> DiTTransformer2DModel:
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=3,
        out_channels=3,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=classes,
    ).eval()


def pool(network: DiTTransformer2DModel, no_class: int = 10) -> CalibrationSet:
    conditioning = Conditioning(torch.tensor([0, 3, 2, 1]), torch.full((4,), no_class))
    settings = SamplingSettings(5, guidance_scale=2.0)
    return collect_calibration(
        network, networks.scheduler(), networks.noise(4), settings, batch=4, conditioning=conditioning
    )


@torch.no_grad()
def test_block_by_block_is_the_whole_forward_pass():
    network = transformer()
    backbone, rows = backbone_of(network), CalibrationRows(networks.noise(4), STEPS, CLASSES)
    expected = network(rows.latents, timestep=STEPS, class_labels=CLASSES).sample
    torch.testing.assert_close(evaluate(network, rows.latents, STEPS, CLASSES), expected, rtol=0, atol=0)
    stream = BlockStream(network, backbone, rows, 3, Place(network.device))
    for block in backbone.blocks:
        stream.advance(block, stream.outputs(block, stream.inputs(block)))
    torch.testing.assert_close(stream.hidden, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_temporal_features_depend_on_the_time_step_alone_and_modulations_on_the_class_too():
    network = transformer()
    backbone, seen = backbone_of(network), {}
    for path in (*backbone.temporal, *backbone.roles["modulation"]):
        network.get_submodule(path).register_forward_hook(
            lambda module, args, output, path=path: seen.setdefault(path, []).append(output)
        )
    for labels in (CLASSES, CLASSES.flip(0)):
        evaluate(network, networks.noise(4), STEPS, labels)
    for path in backbone.temporal:
        assert all(torch.equal(seen[path][0], output) for output in seen[path]), path
    for path in backbone.roles["modulation"]:
        assert not torch.allclose(*seen[path]), path
    features = backbone.temporal_features(network, STEPS)
    for path, feature in zip(backbone.time_projections, features, strict=True):
        torch.testing.assert_close(seen[path][0], feature)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_quantises_it_keeps_it_in_a_file_and_says_what_it_costs(name, tmp_path):
    method, precision, full = discover.method(name), Precision.parse("w4a8"), transformer()
    recipe, given = small(method).recipe(), pool(full)
    planned = plan_cost(copy.deepcopy(full).to("meta"), precision, recipe, given).cost
    network = copy.deepcopy(full)
    report = quantize_(network, precision, recipe, given, networks.generator())
    assert all(layer.codes is not None for layer in quantized_layers(network).values())
    assert all(row.reason or row.activation_bits <= 8 for row in report.coverage)
    if name != "ptqd_mixed":  # which says at most what it spends
        assert planned.unet_evaluations == report.cost.unet_evaluations
        assert planned.optimizer_steps == report.cost.optimizer_steps
    save_quantized(network, tmp_path / "q.safetensors", {})
    with torch.no_grad():
        expected, found, again = (
            evaluate(each, networks.noise(4), STEPS, CLASSES)
            for each in (full, network, load_quantized(tmp_path / "q.safetensors"))
        )
    assert 0 < (found - expected).norm() / expected.norm() < 0.2
    torch.testing.assert_close(again, found, rtol=0, atol=1e-6)


def test_where_all_features_are_looked_up_the_time_embedding_is_gone():
    network = transformer()
    recipe = (TemporalCache("all"), *networks.recipe())
    quantize_(network, Precision.parse("w4a8"), recipe, pool(network), networks.generator())
    covered = {row.path: row.kind for row in coverage(network)}
    for path in backbone_of(transformer()).time_embedding:
        assert path not in covered
    for path in backbone_of(transformer()).time_projections:
        assert covered[path] == "lookup table"


def test_a_random_condition_is_a_class_or_none():
    network, generator = transformer(classes=3), torch.Generator().manual_seed(0)
    found = backbone_of(network).random_condition(network, 200, 7, torch.device("cpu"), generator)
    assert found.dtype == torch.int64 and found.unique().tolist() == [0, 1, 2, 3], "three classes and none"
    with torch.no_grad():
        evaluate(network, networks.noise(4), STEPS, found[:4])


def test_classes_are_asked_for():
    network = transformer()
    unconditional = networks.pool(networks.unconditional())
    message = r"conditioned on nothing, and a DiTTransformer2DModel takes classes \(rows,\)"
    with pytest.raises(ValueError, match=message):
        quantize_(network, Precision.parse("w4a8"), networks.recipe(), unconditional, networks.generator())
    assert not activation_quantizers(network)


def test_the_stock_pipeline_draws_the_images_of_the_sampling_loop():
    network = transformer(classes=1000)
    quantize_(network, Precision.parse("w4a8"), networks.recipe(), pool(network, no_class=1000), networks.generator())
    scheduler, vae = networks.scheduler(), networks.first_stage()
    pipeline = DiTPipeline(network, vae, scheduler, {3: "three", 5: "five"})
    pipeline.set_progress_bar_config(disable=True)
    labels = pipeline.get_label_ids(["three", "five"])
    images = pipeline(labels, 2.0, torch.Generator().manual_seed(7), num_inference_steps=5, output_type="np").images
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(7))
    conditioning = Conditioning(torch.tensor(labels), torch.full((2,), 1000))
    settings = SamplingSettings(5, guidance_scale=2.0)
    latents = sample(network, scheduler, noise, settings, conditioning=conditioning)
    with torch.no_grad():
        decoded = vae.decode(latents / vae.config.scaling_factor).sample
    expected = (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(torch.from_numpy(images), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_of_a_network_that_predicts_the_variance_too_the_noise_is_taken():
    torch.manual_seed(0)
    network = DiTTransformer2DModel(2, 8, in_channels=3, out_channels=6, num_layers=1, sample_size=8).eval()
    x, labels = networks.noise(2), torch.tensor([3, 5])
    whole = network(x, timestep=torch.tensor([401, 401]), class_labels=labels).sample
    assert torch.equal(evaluate(network, x, torch.tensor(401), labels), whole[:, :3])
