"""ReLU in the place of SiLU: where it stands, that tuning helps, and that nothing else changes."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.tfmq import networks
from tests.tfmq.network import test_transformer
from tfmq.cost import plan_cost
from tfmq.modules.rectified import Rectified
from tfmq.network.backbone import backbone_of, evaluate
from tfmq.network.sampling import predict_noise
from tfmq.passes.rectification import Rectification, rectified_inputs, silu_over_pixels
from tfmq.passes.weight_ranges import RoundToNearest, WeightRanges
from tfmq.plan import quantized_layers
from tfmq.precision import Precision
from tfmq.quantization import quantize_
from tfmq.workspace import FolderWorkspace

TUNING = Rectification(40, 8, 2e-3, networks.ALL_ROWS)
ROUNDING = (WeightRanges("minmax"), RoundToNearest())
W8A32 = Precision(8, 32)


@torch.no_grad()
def error(network, full, pool, kind="unconditional") -> float:
    """Of the prediction at all steps of the pool, after guidance."""
    conditioning, scale = networks.KINDS[kind].conditioning(4), pool.settings.guidance_scale
    steps = zip(pool.latents, pool.timesteps, strict=True)
    pairs = [[predict_noise(u, x, t, conditioning, scale) for u in (network, full)] for x, t in steps]
    return sum(((found - wanted).norm() / wanted.norm()).item() for found, wanted in pairs) / len(pairs)


@pytest.mark.parametrize("kind", ["unconditional", "class"])
def test_tuning_reduces_the_error_that_relu_brings(kind):
    build, pool = networks.KINDS[kind].build, networks.KINDS[kind].pool(networks.KINDS[kind].build())
    errors = {}
    for iterations in (0, 40):
        recipe = (replace(TUNING, iterations=iterations), *ROUNDING)
        network, full, _, report = networks.quantized(recipe, W8A32, build, pool)
        errors[iterations] = error(network, full, pool, kind)
        assert report.cost.optimizer_steps == iterations
    exact, *_ = networks.quantized(ROUNDING, W8A32, build, pool)
    assert errors[40] < 0.7 * errors[0] and error(exact, full, pool, kind) < errors[40]


def test_relu_stands_where_silu_acts_on_pixels_and_what_it_feeds_is_zero_or_more():
    network, full, pool, _ = networks.quantized((replace(TUNING, iterations=2), *ROUNDING), W8A32)
    rectified = {path for path, module in network.named_modules() if isinstance(module, Rectified)}
    blocks = [path for path in dict(full.named_modules()) if path.endswith(".nonlinearity")]
    assert rectified == {*blocks, "conv_act"} and isinstance(network.time_embedding.act, nn.SiLU)
    plan = networks.plan(full, "w8a32", TUNING)
    behind = rectified_inputs(plan, full, backbone_of(full))
    expected = {f"{path.rpartition('.')[0]}.{name}" for path in blocks for name in ("conv1", "conv2", "time_emb_proj")}
    assert behind == expected | {"conv_out"} and not rectified_inputs(
        networks.plan(full, "w8a32"), full, backbone_of(full)
    )
    seen = {}
    before = {}
    for path in behind:
        layer = network.get_submodule(path)
        layer.register_forward_pre_hook(lambda _, args, path=path: seen.__setitem__(path, args[0]))
    for path in rectified:
        module = network.get_submodule(path)
        module.register_forward_pre_hook(lambda _, args, path=path: before.setdefault(path, []).append(args[0]))
    with torch.no_grad():
        evaluate(network, networks.noise(2), torch.tensor(401))
    assert set(seen) == behind
    for path, x in seen.items():
        assert (x >= 0).all() and 0.2 < (x == 0).float().mean() < 0.8, path
    (given,) = before["conv_act"]
    assert torch.equal(seen["conv_out"] == 0, given <= 0)


def test_all_parameters_learn_and_the_given_network_is_left_alone():
    unet = networks.unconditional()
    before = {name: parameter.clone() for name, parameter in unet.named_parameters()}
    network, full, *_ = networks.quantized((replace(TUNING, iterations=3), *ROUNDING), W8A32)
    assert all(torch.equal(parameter, before[name]) for name, parameter in full.named_parameters())
    moved = [not torch.equal(parameter, before[name]) for name, parameter in network.named_parameters()]
    assert all(moved) and not any(parameter.requires_grad for parameter in network.parameters())
    assert not any(isinstance(module, Rectified) for module in full.modules())


def test_transformers_have_nothing_to_rectify():
    network = test_transformer.transformer()
    given = copy.deepcopy(network)
    pool = test_transformer.pool(network)
    assert silu_over_pixels(network) == ()
    found, _, _, report = networks.quantized((TUNING, *ROUNDING), W8A32, lambda: network, pool)
    assert report.cost.optimizer_steps == 0 == report.cost.unet_evaluations
    plain, *_ = networks.quantized(ROUNDING, W8A32, lambda: given, pool)
    assert all(
        torch.equal(layer.weight, plain.get_submodule(path).weight) for path, layer in quantized_layers(found).items()
    )


def test_is_kept_and_found_again(tmp_path):
    recipe = (replace(TUNING, iterations=2), *ROUNDING)
    states = []
    for _ in range(2):
        unet = networks.unconditional()
        pool = networks.pool(unet)
        report = quantize_(unet, W8A32, recipe, pool, networks.generator(), workspace=FolderWorkspace(tmp_path))
        states.append((unet.state_dict(), report.cost))
    assert states[0][1] == states[1][1] and len(list(tmp_path.iterdir())) == 1
    assert all(torch.equal(tensor, states[1][0][name]) for name, tensor in states[0][0].items())


def test_cost_and_memory_are_planned():
    unet = networks.unconditional()
    pool = networks.pool(unet)
    recipe = (TUNING, *ROUNDING)
    planned = plan_cost(copy.deepcopy(unet).to("meta"), W8A32, recipe, pool)
    assert (planned.cost.unet_evaluations, planned.cost.optimizer_steps, planned.cost.learned_rows) == (20, 40, 320)
    parameters = sum(parameter.nbytes for parameter in unet.parameters())
    # The copy, two tensors of Adam and gradients, besides activations.
    assert planned.memories[0].held > 4 * parameters and planned.memories[1].held < parameters


@pytest.mark.parametrize("field", [{"iterations": -1}, {"batch": 0}, {"learning_rate": 0.0}])
def test_settings_are_checked(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        Rectification(**field)


def test_it_goes_before_weights_have_ranges():
    with pytest.raises(ValueError, match="has a range already: let rectification come before"):
        networks.quantized((WeightRanges("minmax"), replace(TUNING, iterations=1), RoundToNearest()), W8A32)
