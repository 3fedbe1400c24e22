"""Networks in float16, bfloat16 and float64: quantised as their float32 copy is, sampled, saved, loaded and cast."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DiTPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)

from tests.tfmq import networks
from tests.tfmq.network.test_transformer import pool as pool_of_classes
from tests.tfmq.network.test_transformer import transformer
from tfmq.checkpoint import load_quantized, save_quantized
from tfmq.cost import plan_cost
from tfmq.modules.cache import cached_projections
from tfmq.modules.dynamic import DynamicQuantize
from tfmq.modules.fake_quantize import FakeQuantize, StepTracker
from tfmq.modules.layers import quantized_layer
from tfmq.network.backbone import Network
from tfmq.network.calibration import CalibrationSet
from tfmq.network.sampling import SamplingSettings, sample
from tfmq.numerics.affine import Grid, fake_quantize
from tfmq.passes.correction import MeasureCorrection, correction_of
from tfmq.passes.grids import Grids
from tfmq.passes.low_rank import LowRankBranches
from tfmq.passes.reconstruction import RoundingConfig, StepSizeConfig
from tfmq.passes.temporal_cache import TemporalCache
from tfmq.passes.weight_ranges import RoundToNearest, WeightRanges
from tfmq.plan import activation_quantizers, quantized_layers
from tfmq.precision import Precision
from tfmq.quantization import quantize_
from tfmq.state import coverage

HALVES = [torch.float16, torch.bfloat16]
OTHERS = [*HALVES, torch.float64]
NEAREST = networks.recipe(weight_range="minmax")
# How far a network in such a type may be from float32, relative to its output.
TOLERANCE = {torch.float16: 0.01, torch.bfloat16: 0.06, torch.float64: 1e-3}
W4A8 = Precision.parse("w4a8")


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def twins(kind: torch.dtype, recipe, build=networks.unconditional, pool=networks.pool, precision=W4A8):
    """A network of a type and its copy in float32, both quantised, and the pool that was recorded on the first."""
    network = build().to(kind)
    copied = copy.deepcopy(network).float()
    recorded = pool(network)
    for each in (network, copied):
        quantize_(each, precision, recipe, recorded, networks.generator())
    return network, copied, recorded


def assert_same_quantisation(network: Network, copied: Network) -> None:
    """Codes, scales, tables and corrections are those of the float32 copy; weights are these in the network's type."""
    kind, found, expected = network.dtype, network.state_dict(), copied.state_dict()
    parameters = {name for name, _ in network.named_parameters()}
    assert found.keys() == expected.keys() and quantized_layers(network)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor.to(kind) if name in parameters else tensor), name
        assert found[name].dtype == (kind if name in parameters else tensor.dtype), name
    assert all(layer.consistent for layer in quantized_layers(network).values())


@pytest.mark.parametrize("kind", OTHERS)
def test_quantised_as_the_copy_in_float32(kind):
    rounding, step_sizes = RoundingConfig(iterations=2, batch=4), StepSizeConfig(iterations=2, batch=4)
    learned = networks.recipe(rounding=rounding, temporal=rounding, scales="temporal", step_sizes=step_sizes)
    network, copied, pool = twins(kind, learned)
    assert network.dtype == kind and copied.dtype == torch.float32
    assert_same_quantisation(network, copied)
    x, step = networks.noise(), pool.timesteps[2]
    with torch.no_grad():
        full = networks.unconditional().to(kind).float()(x, step).sample
        found, expected = network(x.to(kind), step).sample, copied(x, step).sample
    assert found.dtype == kind and relative(found, full) < 1.1 * relative(expected, full)


@pytest.mark.parametrize("kind", OTHERS)
def test_computes_what_the_copy_in_float32_does(kind):
    """With 16 bits: at fewer, what half precision rounds away takes some activations to the next point of the grid."""
    network, copied, pool = twins(kind, networks.recipe(scales="per_step"), precision=Precision.parse("w8a16"))
    with torch.no_grad():
        found = network(networks.noise().to(kind), pool.timesteps[2]).sample
        expected = copied(networks.noise(), pool.timesteps[2]).sample
    assert found.dtype == kind and relative(found, expected) < TOLERANCE[kind]


@pytest.mark.parametrize("kind", HALVES)
def test_a_diffusion_transformer(kind):
    recipe = (*networks.recipe(rounding=RoundingConfig(iterations=2, batch=4)), TemporalCache("projection"))
    network, copied, pool = twins(kind, recipe, transformer, pool_of_classes)
    assert_same_quantisation(network, copied)
    classes, steps = torch.tensor([0, 3]), pool.timesteps[:1].expand(2)
    with torch.no_grad():
        found = network(networks.noise(2).to(kind), timestep=steps, class_labels=classes).sample
        expected = copied(networks.noise(2), timestep=steps, class_labels=classes).sample
    assert found.dtype == kind and relative(found, expected) < TOLERANCE[kind]


def weights_and_scales(network: Network) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items() if tensor.is_floating_point()}


@pytest.mark.parametrize("kind", [*OTHERS, torch.float8_e4m3fn])
def test_casting_there_and_back_loses_nothing_that_is_quantised(kind):
    dynamic = (
        Grids(weight_group=8, dynamic_activations=True),
        LowRankBranches(2, 2, 4, data=networks.ALL_ROWS),
        WeightRanges("minmax"),
        RoundToNearest(),
    )
    with pytest.warns(UserWarning, match="noise correction"):
        corrected = networks.quantized((*NEAREST, TemporalCache("step"), MeasureCorrection(4, 4)))[0]
    for network in (corrected, networks.quantized(dynamic)[0]):
        before, layers = weights_and_scales(network), quantized_layers(network)
        quantised = {f"{path}.weight" for path in layers} | {name for name, _ in network.named_buffers()}
        expected = {path: layer._dequantized(layer.codes) for path, layer in layers.items()}
        network.to(kind)
        for path, layer in layers.items():
            assert layer.weight.dtype == kind and layer.consistent
            assert torch.equal(layer.weight.float(), expected[path].to(kind).float())
        network.float()
        after = weights_and_scales(network)
        assert quantised & before.keys() and after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in quantised & before.keys())


def test_codes_follow_a_device_and_keep_their_types():
    with pytest.warns(UserWarning, match="noise correction"):
        network = networks.quantized((TemporalCache("all"), *NEAREST, MeasureCorrection(4, 4)))[0]
    types = {name: buffer.dtype for name, buffer in network.named_buffers()}
    assert {torch.uint8, torch.float32, torch.float64, torch.int64, torch.bool} <= set(types.values())
    network.to("meta", torch.bfloat16)
    assert {buffer.device.type for buffer in network.buffers()} == {"meta"}
    assert {name: buffer.dtype for name, buffer in network.named_buffers()} == types
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}
    assert correction_of(network).alphas.dtype == torch.float64 and cached_projections(network)


def test_a_weight_that_was_changed_since_is_cast_as_it_is():
    network = networks.quantized(NEAREST)[0]
    layer = network.mid_block.resnets[0].conv1
    layer.weight.data.mul_(1.5)
    changed = layer.weight.half()
    network.half()
    assert torch.equal(layer.weight, changed) and not layer.consistent
    assert network.conv_in.consistent


@pytest.mark.parametrize("kind", OTHERS)
def test_a_checkpoint_keeps_the_type(kind, tmp_path):
    network, copied, pool = twins(kind, networks.recipe(scales="per_step"))
    save_quantized(network, tmp_path / "quantized.safetensors", {})
    loaded = load_quantized(tmp_path / "quantized.safetensors")
    assert loaded.dtype == kind
    assert_same_quantisation(loaded, copied)
    with torch.no_grad():
        x = networks.noise().to(kind)
        assert torch.equal(loaded(x, pool.timesteps[0]).sample, network(x, pool.timesteps[0]).sample)
    loaded.float()
    save_quantized(loaded, tmp_path / "float32.safetensors", {})
    assert load_quantized(tmp_path / "float32.safetensors").dtype == torch.float32


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_another_default_type_changes_nothing(default, tmp_path):
    recipe = (Grids(split_shortcuts=True), *networks.recipe(scales="per_step")[1:], TemporalCache("step"))
    expected, _, pool, _ = networks.quantized(recipe)
    save_quantized(expected, tmp_path / "quantized.safetensors", {})
    network = networks.unconditional()
    torch.set_default_dtype(default)
    try:
        quantize_(network, W4A8, recipe, pool, networks.generator())
        loaded = load_quantized(tmp_path / "quantized.safetensors")
    finally:
        torch.set_default_dtype(torch.float32)
    for each in (network, loaded):
        assert_same_quantisation(each, expected)


def test_what_no_pass_touches_keeps_all_digits_of_float64():
    network = networks.unconditional().double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, dtype=torch.float64, generator=networks.generator()) / 3e3)
    given = copy.deepcopy(network)
    quantize_(network, W4A8, NEAREST, networks.pool(given), networks.generator())
    weights = {f"{path}.weight" for path in quantized_layers(network)}
    for name, parameter in given.named_parameters():
        assert torch.equal(network.get_parameter(name), parameter) == (name not in weights), name


@pytest.mark.parametrize("kind", HALVES)
def test_a_failure_leaves_the_network_as_it_was(kind):
    network = networks.unconditional().to(kind)
    given, pool = copy.deepcopy(network), networks.pool(network)
    with pytest.raises(ValueError, match="leaves the weight of conv_in unrounded"):
        quantize_(network, W4A8, NEAREST[:2], pool, networks.generator())
    assert network.dtype == kind and not quantized_layers(network)
    for name, parameter in given.named_parameters():
        assert torch.equal(network.get_parameter(name), parameter)


def test_types_that_are_not_computed_in_are_refused_before_anything_is(monkeypatch, tmp_path):
    monkeypatch.setattr("tfmq.quantization.insert_quantizers", lambda *_: pytest.fail("something was computed"))
    pool = networks.pool(networks.unconditional())
    float8, mixed = networks.unconditional(), networks.unconditional().half()
    float8.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
    mixed.conv_norm_out.float()
    for network, message in ((float8, "of type torch.float8_e4m3fn; taken are"), (mixed, "cast it to one type")):
        with pytest.raises(ValueError, match=message):
            quantize_(network, W4A8, NEAREST, pool, networks.generator())
        with pytest.raises(ValueError, match=message):
            plan_cost(network.to("meta"), W4A8, NEAREST, pool)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_layerwise_casting_of_a_quantised_network_rounds_its_biases_alone(compute, tmp_path):
    """Codes have the weights: they are exact in each forward pass, where the stock layer's were cast twice."""
    network = networks.quantized(NEAREST)[0].to(compute)
    expected = copy.deepcopy(network)
    stored = {name for name, _ in network.named_parameters() if name.endswith("bias") and "norm" not in name}
    with torch.no_grad():
        for name in stored:
            parameter = expected.get_parameter(name)
            parameter.copy_(parameter.to(torch.float8_e4m3fn).to(compute))
    network.enable_layerwise_casting(torch.float8_e4m3fn, compute)
    assert network.conv_in.weight.dtype == torch.float8_e4m3fn
    x = networks.noise().to(compute)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(network(x, 401).sample, expected(x, 401).sample)
    with pytest.raises(ValueError, match="layerwise casting"):
        save_quantized(network, tmp_path / "quantized.safetensors", {})
    assert torch.isfinite(sample(network, networks.scheduler(), networks.noise(), networks.SETTINGS)).all()


@pytest.mark.parametrize("kind", [torch.float32, *HALVES])
def test_autocast_computes_as_near_as_on_the_full_precision_network(kind):
    recipe = (*networks.recipe(scales="per_step"), TemporalCache("step"))
    network, full, pool, _ = networks.quantized(recipe, "w8a16")
    x, step = networks.noise(), pool.timesteps[1]
    with torch.no_grad():
        expected = network(x, step).sample
        with torch.autocast("cpu", torch.bfloat16 if kind == torch.float32 else kind, enabled=kind != torch.float32):
            found, stock = network(x, step).sample, full(x, step).sample
    assert found.dtype == stock.dtype
    assert relative(found, expected) <= TOLERANCE.get(kind, 0)


# In stock pipelines


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.parametrize("scales", ["shared", "per_step"])
def test_an_unconditional_pipeline_draws_what_sample_draws(kind, scales):
    network, _, pool = twins(kind, networks.recipe(scales=scales))
    pipeline = quiet(DDIMPipeline(network, networks.scheduler()))
    images = pipeline(2, networks.generator(), num_inference_steps=5, output_type="pt").images
    start = torch.randn(2, 3, 8, 8, generator=networks.generator(), dtype=kind)
    latents = sample(network, networks.scheduler(), start, networks.SETTINGS)
    assert latents.dtype == kind
    assert torch.equal(images, (latents / 2 + 0.5).clamp(0, 1))


def decoder(channels: int) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(3, 3, block_out_channels=(8,), latent_channels=channels, norm_num_groups=4).eval()


@pytest.mark.parametrize("kind", HALVES)
def test_a_pipeline_with_prompts_cast_before_and_after(kind):
    text = networks.KINDS["text"]
    conditioning, settings = text.conditioning(2), text.settings
    network, copied, _ = twins(kind, networks.recipe(), text.build, text.pool)
    for each in (network, copied):
        parts = {"vae": decoder(3), "text_encoder": None, "tokenizer": None, "safety_checker": None}
        pipeline = StableDiffusionPipeline(
            unet=each, scheduler=text.scheduler(), feature_extractor=None, requires_safety_checker=False, **parts
        )
        quiet(pipeline.to(dtype=kind))
        latents = pipeline(
            prompt_embeds=conditioning.context.to(kind),
            negative_prompt_embeds=conditioning.unconditional.to(kind),
            latents=networks.noise(2).to(kind),
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            output_type="latent",
        ).images
        own = sample(network, text.scheduler(), networks.noise(2), settings, conditioning=conditioning)
        assert latents.dtype == kind and torch.equal(latents, own)


def test_a_pipeline_of_a_transformer():
    network, _, _ = twins(
        torch.bfloat16, networks.recipe(), lambda: transformer(1000), lambda n: pool_of_classes(n, 1000)
    )
    pipeline = quiet(DiTPipeline(network, decoder(3).bfloat16(), networks.scheduler()))
    images = pipeline([1, 2], 2.0, networks.generator(), 5, output_type="np").images
    assert images.shape[0] == 2 and (images == images).all()


# Pools and samples


@pytest.mark.parametrize("kind", HALVES)
def test_the_pool_is_what_the_network_takes_and_puts_out(kind):
    network = networks.unconditional().to(kind)
    pool = networks.pool(network)
    assert {tensor.dtype for tensor in (pool.latents, pool.noise, pool.samples)} == {torch.float32}
    scheduler, latents = networks.scheduler(), networks.noise().to(kind)
    scheduler.set_timesteps(5)
    for index, timestep in enumerate(scheduler.timesteps):
        assert torch.equal(pool.latents[index], latents.float())
        with torch.no_grad():
            predicted = network(latents, timestep).sample
        assert torch.equal(pool.noise[index], predicted.float())
        latents = scheduler.step(predicted, timestep, latents).prev_sample
    assert latents.dtype == kind and torch.equal(pool.samples, latents.float())


def test_noise_and_context_of_other_types_are_cast_to_the_network_s():
    kind = networks.KINDS["class"]
    network, conditioning = kind.build().half(), kind.conditioning(2)
    expected = sample(network, kind.scheduler(), networks.noise(2).half(), kind.settings, conditioning=conditioning)
    for other in (torch.float32, torch.float64):
        start = networks.noise(2).half().to(other)
        assert torch.equal(sample(network, kind.scheduler(), start, kind.settings, conditioning=conditioning), expected)
    settings, step_noise = SamplingSettings(5, eta=1.0), torch.randn(5, 2, 3, 8, 8, generator=networks.generator())
    noisy = [
        sample(networks.unconditional().half(), networks.scheduler(), networks.noise(2), settings, step_noise=each)
        for each in (step_noise, step_noise.half())
    ]
    assert noisy[0].dtype == torch.float16 and torch.equal(*noisy)


def test_a_pool_in_half_precision_serves_as_its_copy_in_float32():
    kind = networks.KINDS["class"]
    pool = kind.pool(kind.build())
    halved = {name: part.half() for name, part in pool.tensors.items() if part.dtype == torch.float32}
    widened = {name: part.float() for name, part in halved.items()}
    found = []
    for tensors in (halved, widened):
        given = CalibrationSet(**{**pool.tensors, **tensors}, settings=pool.settings)
        recipe = networks.recipe(rounding=RoundingConfig(iterations=1, batch=4))
        found.append(networks.quantized(recipe, build=kind.build, recorded=given)[0])
    assert_same_quantisation(*found)


def test_cost_counts_the_float32_copies_that_are_learned_on():
    def on_meta(kind: torch.dtype) -> Network:
        with torch.device("meta"):
            return networks.unconditional().to(kind)

    pool, recipe = networks.pool(networks.unconditional()), networks.recipe(rounding=RoundingConfig(iterations=1))
    full, half = (plan_cost(on_meta(kind), W4A8, recipe, pool) for kind in (torch.float32, torch.float16))
    assert half.costs == full.costs and half.memories == full.memories
    assert half.networks - full.networks == sum(2 * part.numel() for part in on_meta(torch.float16).parameters())


# Arithmetic


@pytest.mark.parametrize("kind", HALVES)
def test_activations_are_rounded_in_float32(kind):
    """Against float64: x is the half number that it is, and the value on the grid is rounded once."""
    x = (torch.randn(4, 33, generator=networks.generator()) * 3).to(kind)
    scale, zero_point = torch.tensor([0.0317]), torch.tensor([117.0])
    codes = ((x.double() / scale.double()).round() + 117).clamp(0, 255)
    expected = ((codes - 117) * scale.double()).to(kind)
    found = fake_quantize(x, scale, zero_point, Grid.unsigned(8))
    assert found.dtype == kind and torch.equal(found, expected)
    quantizer = FakeQuantize(8, StepTracker())
    quantizer.half()
    quantizer.observe()
    quantizer(x)
    quantizer.freeze()
    assert quantizer.scale.dtype == torch.float32 and quantizer(x).dtype == kind
    low, high = x.double().min(), x.double().max()
    torch.testing.assert_close(quantizer.scale.double(), ((high - low) / 255)[None], rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", HALVES)
def test_dynamic_ranges_are_found_in_float32(kind):
    x = torch.randn(2, 3, 16, generator=networks.generator()).to(kind)
    found = DynamicQuantize(8)(x)
    assert found.dtype == kind and torch.equal(found, DynamicQuantize(8)(x.float()).to(kind))


@pytest.mark.parametrize("kind", HALVES)
def test_gradients_pass_through_a_layer_in_half_precision(kind):
    layer = quantized_layer(torch.nn.Linear(6, 4).to(kind), 4, 8, StepTracker())
    layer.find_weight_range("minmax")
    layer.fold()
    layer.input_quantizer.observe()
    x = torch.randn(5, 6, generator=networks.generator()).to(kind)
    layer(x)
    layer.input_quantizer.freeze()
    x.requires_grad_()
    layer(x).sum().backward()
    expected = layer.weight.detach().float().sum(0).expand(5, 6)
    assert x.grad.dtype == kind
    torch.testing.assert_close(x.grad.float(), expected, rtol=0.02, atol=0.02)


def test_attention_that_computes_its_scores_in_float32():
    """As Stable Diffusion 2.1 does."""
    config = dict(networks.conditional().config) | {"upcast_attention": True}
    text = networks.KINDS["text"]

    def build() -> UNet2DConditionModel:
        torch.manual_seed(0)
        return UNet2DConditionModel.from_config(config).eval()

    network, copied, _ = twins(torch.float16, networks.recipe(), build, text.pool, Precision.parse("w8a16"))
    assert_same_quantisation(network, copied)
    assert relative(text.draw(network), text.draw(copied)) < 0.02


def test_coverage_is_that_of_float32():
    network, copied, _ = twins(torch.bfloat16, NEAREST)
    assert coverage(network) == coverage(copied)
    assert all(quantizer.enabled for quantizer in activation_quantizers(network).values())
