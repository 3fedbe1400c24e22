"""Tuning end to end: its gradients, what may change and what not, and that a network comes nearer to full precision."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from tests.tfmq import networks
from tests.tfmq.network import test_transformer
from tfmq.checkpoint import load_quantized, save_quantized
from tfmq.cost import plan_cost
from tfmq.execution import executing
from tfmq.modules.integer_products import cpu_is_exact
from tfmq.network.backbone import evaluate
from tfmq.network.fresh_noise import FreshNoise
from tfmq.network.sampling import predict_noise
from tfmq.passes.grids import Grids
from tfmq.passes.noise_distillation import (
    NoiseDistillation,
    Tuned,
    guide,
    is_both_halves,
    predictions,
    relative_error,
    tune,
)
from tfmq.passes.weight_ranges import RoundToNearest, WeightRanges
from tfmq.plan import activation_quantizers, quantized_layers
from tfmq.precision import Precision
from tfmq.quantization import quantize_
from tfmq.workspace import FolderWorkspace

RECIPE = networks.recipe(scales="temporal", split_shortcuts=True, weight_range="minmax")
TUNING = NoiseDistillation(30, 8, 3e-3, 3e-3, 3e-3, 0.02, data=networks.ALL_ROWS)
FEW = replace(TUNING, iterations=2)


def prepared(precision: str = "w4a8", recipe=RECIPE, kind: str = "unconditional"):
    """A quantised network, the full-precision one, its pool, and rows with their targets."""
    if kind == "transformer":
        build = test_transformer.transformer
        pool = test_transformer.pool(build())
    else:
        build = networks.KINDS[kind].build
        pool = networks.KINDS[kind].pool(build())
    network, full, *_ = networks.quantized(recipe, precision, build, pool)
    rows = networks.ALL_ROWS(pool, networks.generator())
    return network, full.eval(), pool, rows, predictions(full, rows, 8)


@torch.no_grad()
def error(network, pool, rows, targets) -> float:
    """Of the guided prediction, where there is guidance."""
    found = predictions(network, rows, 8)
    if pool.unconditional is not None:
        found, targets = (guide(each, pool.settings.guidance_scale) for each in (found, targets))
    return relative_error(found, targets, 1.0).item()


@pytest.mark.parametrize(
    ("kind", "precision", "rate"),
    [
        ("unconditional", "w4a4", 3e-3),
        ("class", "w4a4", 1e-3),
        ("text", "w4a8", 1e-3),
        ("transformer", "w4a4", 3e-3),
    ],
)
def test_a_network_comes_nearer_to_full_precision(kind, precision, rate):
    tuning = replace(TUNING, scale_rate=rate, step_size_rate=rate, vector_rate=rate, rounding_rate=5 * rate)
    before, _, pool, rows, targets = prepared(precision, kind=kind)
    after, *_ = prepared(precision, (*RECIPE, tuning), kind)
    assert error(after, pool, rows, targets) < 0.95 * error(before, pool, rows, targets)


def test_it_lets_be_what_has_more_bits_than_it_is_for():
    before, *_ = prepared("w4a8")
    for bits, same in ((7, True), (8, False)):
        after, *_ = prepared("w4a8", (*RECIPE, replace(FEW, most_activation_bits=bits)))
        kept, found = before.state_dict(), after.state_dict()
        assert all(torch.equal(kept[name], found[name]) for name in kept) == same


def test_dynamic_activations_and_groups_learn_too():
    recipe = (Grids(weight_group=8, dynamic_activations=True), WeightRanges(), RoundToNearest())
    before, _, pool, rows, targets = prepared("w4a4", recipe)
    after, *_ = prepared("w4a4", (*recipe, replace(TUNING, step_size_rate=0.0)))
    assert error(after, pool, rows, targets) < 0.9 * error(before, pool, rows, targets)


@pytest.mark.parametrize("kind", [*networks.KINDS, "transformer"])
def test_gradients_of_scales_and_vectors_are_those_of_finite_differences(kind):
    network, _, _, rows, targets = prepared(
        "w4a32", (Grids(split_shortcuts=True), WeightRanges(), RoundToNearest()), kind
    )
    network, rows, targets = network.double(), rows[::7], targets[::7].double()
    rows = replace(rows, latents=rows.latents.double())
    tuned = Tuned(network, replace(TUNING, rounding_rate=0.0))
    for weight in tuned.weights:
        weight.growth.data = weight.growth.data.double()

    def loss() -> torch.Tensor:
        found = evaluate(network, rows.latents, rows.timesteps, rows.context)
        return relative_error(found, targets, 1.0)

    value = loss()
    value.backward()
    parameters = tuned.parameters
    directions = [torch.randn(p.shape, generator=networks.generator(), dtype=p.dtype) for p in parameters]
    along = sum((p.grad * d).sum() for p, d in zip(parameters, directions, strict=True) if p.grad is not None)
    step, found = 1e-6, []
    with torch.no_grad():
        for sign in (1, -2):
            for p, d in zip(parameters, directions, strict=True):
                p.add_(sign * step * d)
            found.append(loss())
    assert ((found[0] - found[1]) / (2 * step)).item() == pytest.approx(along.item(), rel=1e-5)


def test_gradients_of_step_sizes_are_those_of_lsq():
    network, *_ = prepared()
    tuned = Tuned(network, TUNING)
    tuned.place()
    quantizer, start, growth = next(each for each in tuned.step_sizes if len(each[1]) == 1)
    x, upstream = (torch.randn(50, generator=networks.generator()) for _ in range(2))
    quantizer(3 * x).backward(upstream)
    scale, point, expected = start.item(), quantizer.zero_point.item(), 0.0
    for value, passed in zip((3 * x).tolist(), upstream.tolist(), strict=True):
        code = round(value / scale) + point
        clipped = min(max(code, quantizer.grid.qmin), quantizer.grid.qmax)
        expected += passed * (clipped - point - (value / scale if clipped == code else 0))
    assert growth.grad.item() == pytest.approx(scale * expected, rel=1e-4)


def test_codes_and_zero_points_stay_where_roundings_do_not_move():
    before, *_ = prepared()
    after, *_ = prepared(recipe=(*RECIPE, replace(FEW, rounding_rate=0.0)))
    moved, *_ = prepared(recipe=(*RECIPE, replace(FEW, rounding_rate=1.0)))
    layers = [quantized_layers(network) for network in (before, after, moved)]
    for path, layer in layers[0].items():
        assert torch.equal(layer.codes, layers[1][path].codes), path
        assert not torch.equal(layer.weight_scale, layers[1][path].weight_scale), path
        for each in layers:
            assert torch.equal(layer.weight_zero_point, each[path].weight_zero_point), path
            assert each[path].rounding is None and each[path].consistent, path
        assert layers[2][path].codes.max().item() < 2**layer.weight_bits, path
    assert not all(torch.equal(layer.codes, layers[2][path].codes) for path, layer in layers[0].items())
    for path, quantizer in activation_quantizers(after).items():
        assert torch.equal(quantizer.zero_point, before.get_submodule(path).zero_point), path
        assert not torch.equal(quantizer.scale, before.get_submodule(path).scale), path
    assert not torch.equal(after.conv_norm_out.weight, before.conv_norm_out.weight)
    for each in (after, moved):
        assert not any(p.requires_grad or p.grad is not None for p in each.parameters())
        assert not any(quantizer.scale.requires_grad for quantizer in activation_quantizers(each).values())


def test_a_rate_of_nothing_lets_its_part_be():
    before, *_ = prepared()
    after, *_ = prepared(recipe=(*RECIPE, NoiseDistillation(2, 8, 0.0, 0.0, 1e-3, data=networks.ALL_ROWS)))
    changed = {
        name for name, tensor in after.state_dict().items() if not torch.equal(tensor, before.state_dict()[name])
    }
    assert changed == {name for name, parameter in before.named_parameters() if parameter.dim() == 1}


def test_fresh_noise_is_that_of_the_schedule_and_goes_to_both_halves():
    kind = networks.KINDS["class"]
    pool = kind.pool(kind.build())
    rows = FreshNoise(400)(pool, networks.generator())
    assert len(rows) == 400 and is_both_halves(rows) and set(rows.timesteps.tolist()) == set(pool.timesteps.tolist())
    alpha = networks.scheduler().alphas_cumprod[rows.timesteps].view(-1, 1, 1, 1)
    clean = pool.samples[torch.arange(200) % pool.images].repeat(2, 1, 1, 1)
    noise = (rows.latents - alpha.sqrt() * clean) / (1 - alpha).sqrt()
    assert abs(noise[:200].std() - 1) < 0.02 and len(noise[:200].flatten(1)[:, 0].unique()) == 200
    assert torch.equal(rows.context[:200], pool.context[torch.arange(200) % pool.images])
    assert torch.equal(rows.context[200:], pool.unconditional[torch.arange(200) % pool.images])


@pytest.mark.parametrize("kind", ["class", "text", "transformer"])
def test_under_guidance_it_is_the_guided_prediction_that_counts(kind):
    # Of activations that are not quantised no code can fall to another side where batches differ.
    network, full, pool, rows, targets = prepared("w4a32", (WeightRanges(), RoundToNearest()), kind)
    assert is_both_halves(rows) and not is_both_halves(rows[1:]) and not is_both_halves(rows[:-2])
    scale, pairs = pool.settings.guidance_scale, len(rows) // 2
    config = replace(FEW, iterations=1, batch=len(rows))
    (loss,) = tune(copy.deepcopy(network), rows, targets, scale, config, networks.generator())
    expected = []
    with torch.no_grad():
        for step in range(pool.steps):
            given = pool.timesteps[step], pool.conditioning(step, slice(None), network.device), scale
            found, exact = (predict_noise(each, pool.latents[step], *given) for each in (network, full))
            expected.append((found - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1))
    assert pairs == pool.steps * pool.images
    assert loss == pytest.approx(torch.cat(expected).mean().item(), rel=1e-4)
    assert torch.allclose(guide(targets, 1.0), targets[:pairs], atol=1e-6)


def test_a_network_is_stored_with_all_that_was_learned(tmp_path):
    network, _, _, rows, _ = prepared(recipe=(*RECIPE, FEW))
    save_quantized(network, tmp_path / "q.safetensors", {})
    assert torch.equal(predictions(load_quantized(tmp_path / "q.safetensors"), rows, 8), predictions(network, rows, 8))


@pytest.mark.skipif(not cpu_is_exact(), reason="the 8-bit kernels of this processor are not exact")
def test_it_executes_in_integers():
    network, _, _, rows, _ = prepared("w8a8", (*RECIPE, FEW))
    expected = predictions(network, rows, 8)
    found = predictions(executing(network), rows, 8)
    assert (found - expected).norm() < 0.01 * expected.norm()


def test_what_it_spends_is_planned_and_what_was_learned_is_kept(tmp_path):
    pool, recipe = networks.pool(networks.unconditional()), (*RECIPE, FEW)
    precision = Precision.parse("w4a8")
    planned = plan_cost(networks.unconditional().to("meta"), precision, recipe, pool)
    made = []
    for _ in range(2):
        network = networks.unconditional()
        given = precision, recipe, pool, networks.generator()
        report = quantize_(network, *given, workspace=FolderWorkspace(tmp_path))
        cost, spent = planned.costs[-1][1], report.passes[-1]
        assert (
            (spent.unet_evaluations, spent.optimizer_steps) == (cost.unet_evaluations, cost.optimizer_steps) == (20, 2)
        )
        made.append(network.state_dict())
    assert cost.learned_rows == 2 * 8 and planned.memories[-1].held > 0
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


def test_a_loss_that_is_not_finite_leaves_the_network_as_it_was():
    network = networks.unconditional()
    pool, given = networks.pool(network), copy.deepcopy(network.state_dict())
    wrong = (*RECIPE, replace(TUNING, vector_rate=1e30))
    with pytest.raises(ValueError, match=r"the loss is (nan|inf) at iteration \d+: lower the learning rates"):
        quantize_(network, Precision.parse("w4a8"), wrong, pool, networks.generator())
    assert all(torch.equal(tensor, given[name]) for name, tensor in network.state_dict().items())
    assert not quantized_layers(network) and not any(p.grad is not None for p in network.parameters())


def test_a_network_that_is_not_quantised_yet_is_refused():
    network = networks.unconditional()
    with pytest.raises(ValueError, match="unrounded before the pass noise distillation: add RoundToNearest"):
        quantize_(
            network, Precision.parse("w4a8"), (WeightRanges(), TUNING), networks.pool(network), networks.generator()
        )


def test_settings_that_make_no_sense_are_refused():
    for wrong in ({"iterations": 0}, {"batch": 0}, {"scale_rate": -1.0}, {"rounding_rate": -0.1}, {"norm": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            NoiseDistillation(**wrong)
    with pytest.raises(ValueError, match="nothing learns"):
        NoiseDistillation(scale_rate=0, step_size_rate=0, vector_rate=0)
