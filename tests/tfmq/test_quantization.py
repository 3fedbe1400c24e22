"""The front door, on tiny networks: what each choice does, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from tfmq.passes.temporal import temporal_feature_error

from tests.tfmq import networks
from tfmq import quantization
from tfmq.checkpoint import save_quantized
from tfmq.modules.layers import QuantizedLayer
from tfmq.network.calibration import CalibrationRows
from tfmq.network.offload import BlockStream, Place, waiting_in
from tfmq.network.unet import UNet, UNetLayout
from tfmq.passes.reconstruction import RoundingConfig, StepSizeConfig
from tfmq.plan import activation_quantizers, coverage, insert_quantizers, plan_for, quantized_layers
from tfmq.precision import Precision
from tfmq.quantization import QuantizationConfig, quantize_

ROUNDING = RoundingConfig(iterations=4, batch=8, learning_rate=1e-2)
W4A8 = Precision.parse("w4a8")


def quantized(config: QuantizationConfig, precision: Precision = W4A8, build=networks.unconditional):
    unet = build()
    full = copy.deepcopy(unet)
    pool = networks.pool(full)
    rows = pool.spaced(5, 4)
    report = quantize_(unet, precision, config, rows, rows, pool.timesteps, networks.generator())
    return unet, full, pool, report


def test_every_weight_is_on_its_grid_and_every_quantizer_is_frozen():
    unet, _, _, report = quantized(QuantizationConfig(rounding=ROUNDING, temporal=ROUNDING, split_shortcuts=True))
    for path, layer in quantized_layers(unet).items():
        assert layer.codes.max() <= (255 if path in ("conv_in", "conv_out") else 15), path
        scale, point = layer._spread(layer.weight_scale), layer._spread(layer.weight_zero_point)
        assert torch.equal((layer.codes - point) * scale, layer.weight), path
    assert all(quantizer.enabled and quantizer.observer is None for quantizer in activation_quantizers(unet).values())
    assert not any(row.reason for row in report.coverage)


def test_the_same_generator_gives_the_same_network():
    config = QuantizationConfig(rounding=ROUNDING, step_sizes=StepSizeConfig(iterations=3, batch=8))
    first, second = (quantized(config)[0].state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_effort_counts_every_evaluation_and_step():
    config = QuantizationConfig(rounding=ROUNDING, temporal=ROUNDING, step_sizes=StepSizeConfig(iterations=3, batch=8))
    unet, _, _, report = quantized(config)
    blocks = len(UNetLayout.of(networks.unconditional()).blocks)
    # 20 rows: twice through weight reconstruction, once for ranges, once through step-size learning.
    assert report.effort.unet_evaluations == 20 * 4
    assert report.effort.optimizer_steps == 4 + 4 * blocks + 3 * (2 + blocks)


@pytest.mark.parametrize("precision", ["w4a8", "w8a8"])
def test_finite_set_calibration_lowers_the_temporal_feature_error(precision):
    errors = {}
    for scales in ("shared", "temporal", "per_step"):
        config = QuantizationConfig(activation_scales=scales)
        unet, full, pool, _ = quantized(config, Precision.parse(precision))
        errors[scales] = temporal_feature_error(unet, full, UNetLayout.of(full), pool.timesteps)
        tables = {path for path, quantizer in activation_quantizers(unet).items() if quantizer.per_step}
        temporal = set(UNetLayout.of(full).temporal)
        inside = {path for path in tables if path.removesuffix(".input_quantizer") in temporal}
        assert (tables, inside) == (set(), set()) if scales == "shared" else len(inside) == len(temporal)
        assert scales != "temporal" or tables == inside
    assert errors["temporal"].shape == (5, len(UNetLayout.of(networks.unconditional()).time_projections))
    assert errors["temporal"].mean() < errors["shared"].mean()
    torch.testing.assert_close(errors["temporal"], errors["per_step"])


def test_reconstruction_of_the_temporal_block_lowers_its_error():
    nearest, full, pool, _ = quantized(QuantizationConfig(), Precision.parse("w4a32"))
    config = QuantizationConfig(temporal=RoundingConfig(iterations=150, batch=5, learning_rate=2e-2))
    learned = quantized(config, Precision.parse("w4a32"))[0]
    layout = UNetLayout.of(full)
    before, after = (temporal_feature_error(unet, full, layout, pool.timesteps).mean() for unet in (nearest, learned))
    assert after < 0.8 * before


@torch.no_grad()
def test_reconstruction_brings_the_output_closer_to_full_precision():
    precision = Precision.parse("w4a32")
    nearest, full, pool, _ = quantized(QuantizationConfig(), precision)
    learned = quantized(
        QuantizationConfig(rounding=RoundingConfig(iterations=60, batch=8, learning_rate=2e-2)), precision
    )[0]
    rows = pool.spaced(5, 4)
    target = full(rows.latents, rows.timesteps).sample
    before, after = ((unet(rows.latents, rows.timesteps).sample - target).norm() for unet in (nearest, learned))
    assert after < before


@torch.no_grad()
def test_streaming_gives_what_the_whole_network_gives():
    unet, full, pool, _ = quantized(QuantizationConfig(activation_scales="per_step"))
    rows = pool.spaced(5, 4).shuffled(networks.generator())
    for network in (full, unet):
        stream = BlockStream(network, rows, 6, Place(network.device))
        for block in UNetLayout.of(full).blocks:
            stream.advance(block, stream.outputs(block, stream.inputs(block)))
        expected = network(rows.latents, rows.timesteps).sample
        torch.testing.assert_close(stream.hidden, expected, rtol=1e-4, atol=1e-4)


def test_conditional_networks_are_quantised_too():
    unet = networks.conditional()
    full = copy.deepcopy(unet)
    rows = networks.pool(networks.unconditional()).spaced(5, 4)
    context = torch.randn(20, 5, 12, generator=networks.generator())
    rows = type(rows)(rows.latents, rows.timesteps, context)
    config = QuantizationConfig(rounding=ROUNDING, temporal=ROUNDING, activation_scales="temporal")
    quantize_(unet, W4A8, config, rows, rows, rows.timesteps.unique(), networks.generator())
    with torch.no_grad():
        expected = full(rows.latents, rows.timesteps, context).sample
        error = (unet(rows.latents, rows.timesteps, context).sample - expected).norm() / expected.norm()
    assert 0 < error < 0.5
    tables = {path.removesuffix(".input_quantizer") for path, q in activation_quantizers(unet).items() if q.per_step}
    assert tables == {path for path in quantized_layers(unet) if "time_emb" in path}, "a context is no temporal feature"
    assert all(
        isinstance(m, QuantizedLayer) for m in unet.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)
    )


def test_nan_weights_are_named():
    unet = networks.unconditional()
    with torch.no_grad():
        unet.conv_out.bias[1] = float("inf")
    pool = networks.pool(networks.unconditional())
    rows = pool.spaced(5, 4)
    with pytest.raises(ValueError, match=r"conv_out\.bias holds NaN or infinity: the checkpoint is damaged"):
        quantize_(unet, W4A8, QuantizationConfig(), rows, rows, pool.timesteps, networks.generator())


def dead_layer() -> UNet:
    unet = networks.unconditional()
    with torch.no_grad():
        unet.time_embedding.linear_1.weight.zero_()
        unet.time_embedding.linear_1.bias.zero_()
    return unet


def interrupted(*args, **options):
    raise KeyboardInterrupt


def test_a_dead_layer_is_named():
    with pytest.raises(ValueError, match=r"time_embedding\.linear_2\.input_quantizer is constant \(0\)"):
        quantized(QuantizationConfig(), build=dead_layer)


@pytest.mark.parametrize(
    ("config", "error"),
    [
        (QuantizationConfig(rounding=ROUNDING, activation_scales="temporal"), ValueError),  # constant activations
        (QuantizationConfig(rounding=RoundingConfig(iterations=2, norm=1e5), caching="all"), ValueError),
        (QuantizationConfig(step_sizes=StepSizeConfig(iterations=2)), KeyboardInterrupt),
    ],
)
@torch.no_grad()
def test_after_a_failure_the_network_is_what_it_was(config, error, monkeypatch, tmp_path):
    unet = dead_layer() if config.activation_scales == "temporal" else networks.unconditional()
    before = copy.deepcopy(unet)
    rows = networks.pool(networks.unconditional()).spaced(5, 4)
    given = (rows, rows, rows.timesteps.unique(), networks.generator())
    if error is KeyboardInterrupt:
        monkeypatch.setattr(quantization, "reconstruct_activations", interrupted)
    with pytest.raises(error):
        quantize_(unet, W4A8, config, *given)
    assert unet.state_dict().keys() == before.state_dict().keys()
    assert all(torch.equal(tensor, before.state_dict()[name]) for name, tensor in unet.state_dict().items())
    assert torch.equal(unet(rows.latents, rows.timesteps).sample, before(rows.latents, rows.timesteps).sample)
    assert not quantized_layers(unet) and not unet._forward_pre_hooks and not hasattr(unet, "step_tracker")
    with pytest.raises(ValueError, match="the UNet is not quantised"):
        save_quantized(unet, tmp_path / "q.safetensors", {})
    monkeypatch.undo()
    quantize_(unet, Precision.parse("w4a32"), QuantizationConfig(), *given)
    assert quantized_layers(unet)


def test_the_byte_budget_is_kept_or_refused_with_the_row_count_that_fits():
    with pytest.raises(
        ValueError, match=r"20 calibration rows need .* use at most [1-9]\d* rows or raise memory_bytes"
    ):
        quantized(QuantizationConfig(rounding=ROUNDING, memory_bytes=100_000))
    message = (
        r"20 calibration rows need [\d,]+ bytes .*, one row [\d,]+, and memory_bytes allows 10: raise memory_bytes"
    )
    with pytest.raises(ValueError, match=message):
        quantized(QuantizationConfig(rounding=ROUNDING, memory_bytes=10))


def test_rows_that_do_not_fit_wait_elsewhere_and_nothing_else_changes():
    config = QuantizationConfig(rounding=ROUNDING, step_sizes=StepSizeConfig(iterations=2, batch=8), batch=6)
    allocated = []

    def allocate(elements: int, dtype: torch.dtype) -> torch.Tensor:
        allocated.append(elements)
        return torch.full((elements,), torch.nan, dtype=dtype)

    for build in (networks.unconditional, networks.conditional):
        rows = networks.pool(networks.unconditional()).spaced(5, 4)
        if build is networks.conditional:
            context = torch.randn(20, 5, 12, generator=networks.generator())
            rows = CalibrationRows(rows.latents, rows.timesteps, context)
        unets = build(), build()
        given = (rows, rows, rows.timesteps.unique())
        quantize_(unets[0], W4A8, config, *given, networks.generator())
        with waiting_in(allocate):
            quantize_(unets[1], W4A8, replace(config, memory_bytes=10), *given, networks.generator())
        first, second = (unet.state_dict() for unet in unets)
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert allocated


def test_rows_that_are_not_the_network_s_inputs_are_refused():
    unet, conditional = networks.unconditional(), networks.conditional()
    good = networks.pool(unet).spaced(5, 4)
    latents, timesteps = good.latents, good.timesteps
    context = torch.zeros(20, 5, 12)
    cases = [
        (unet, good[:0], r"holds no calibration row"),
        (
            unet,
            CalibrationRows(latents[:, :2], timesteps),
            r"latents is of shape \(20, 2, 8, 8\): the UNet takes 3 channels",
        ),
        (unet, CalibrationRows(latents[0], timesteps[:3]), r"latents is of shape \(3, 8, 8\)"),
        (unet, CalibrationRows(latents, timesteps, context), "has a context, and a UNet2DModel takes none"),
        (conditional, good, "has no context, and a UNet2DConditionModel takes a context"),
    ]
    for network, bad, message in cases:
        fine = good if network is unet else CalibrationRows(latents, timesteps, context)
        for name, rows in (("rows", (bad, fine)), ("activation_rows", (fine, bad))):
            with pytest.raises(ValueError, match=f"^{name}.?{message}"):
                config = QuantizationConfig(rounding=ROUNDING)
                quantize_(network, W4A8, config, *rows, timesteps, networks.generator())
    with pytest.raises(ValueError, match="timesteps is empty"):
        quantize_(unet, W4A8, QuantizationConfig(), good, good, timesteps[:0], networks.generator())
    assert not quantized_layers(unet) and not quantized_layers(conditional)


@pytest.mark.parametrize("scales", ["shared", "per_step"])
def test_the_progress_bar_of_activation_ranges_knows_its_total(scales, monkeypatch):
    seen = {}

    def bar(items, desc, total=None, disable=None):
        items = list(items)
        seen[desc] = (len(items), len(items) if total is None else total)
        return items

    monkeypatch.setattr(quantization, "tqdm", bar)
    quantized(QuantizationConfig(activation_scales=scales, activation_batch=3))
    assert seen["activation ranges"] == ((7, 7) if scales == "shared" else (10, 10))


def test_coverage_needs_a_quantised_network():
    with pytest.raises(ValueError, match="the UNet is not quantised: call quantize_ first"):
        coverage(networks.unconditional())


def test_full_precision_weights_are_refused():
    with pytest.raises(ValueError, match="leaves the weights in full precision"):
        quantized(QuantizationConfig(), Precision.parse("w32a8"))


@pytest.mark.parametrize("text", ["w4", "8", "w4a8x", "W4A8", "w1a8", "w4a64"])
def test_bad_precisions_are_refused(text):
    with pytest.raises(ValueError):
        Precision.parse(text)


def test_a_quantised_network_is_not_quantised_again():
    unet, _, pool, _ = quantized(QuantizationConfig())
    rows = pool.spaced(5, 4)
    with pytest.raises(ValueError, match="quantised already"):
        quantize_(unet, W4A8, QuantizationConfig(), rows, rows, pool.timesteps, networks.generator())


def test_a_loss_that_is_not_finite_stops_the_run():
    with pytest.raises(ValueError, match="reconstruction loss is NaN or infinite"):
        quantized(QuantizationConfig(rounding=RoundingConfig(iterations=2, norm=1e5)))


def test_quantizers_follow_their_network_to_its_device():
    unet = networks.unconditional().to("meta")
    insert_quantizers(unet, plan_for(unet, UNetLayout.of(unet), W4A8, split_shortcuts=True))
    assert {buffer.device.type for buffer in unet.buffers()} == {"meta"}
