"""Learning roundings and step sizes: against the released code's runs, and its loops."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D

from tests.tfmq.oracle import described, read, settings, tensors
from tests.tfmq.released import (
    BLOCK,
    TIME,
    Recorded,
    assert_follows_published_trace,
    assert_learned_as_well_as_published,
    assert_starts_alike,
    bits,
    learned_layers,
    learning,
    seed,
)
from tfmq.modules.fake_quantize import FakeQuantize, StepTracker
from tfmq.modules.layers import quantized_layer
from tfmq.numerics.rounding import annealed_beta
from tfmq.passes import reconstruction
from tfmq.passes.reconstruction import (
    RoundingConfig,
    StepSizeConfig,
    learn_rounding,
    learn_step_sizes,
    random_batches,
    reconstruction_loss,
)

# -- a residual block -------------------------------------------------------------------------------------------------

# Modules of the block, by their original names.
NAMES = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def nearest_layers():
    """The original names of the layers that are rounded to nearest from the beginning."""
    return [name.removesuffix(".w_nearest") for name in described(BLOCK)["tensors"] if name.endswith(".w_nearest")]


def residual_block():
    """The recorded block: convolutions to be rounded, its embedding projection already rounded to nearest."""
    values, text = tensors(BLOCK), settings(BLOCK)
    groups, eps = read(text, "GroupNorm with # groups eps #")
    block = ResnetBlock2D(
        in_channels=values["x"].shape[1],
        out_channels=values["target"].shape[1],
        temb_channels=values["emb"].shape[1],
        groups=int(groups),
        eps=eps,
        time_embedding_norm="scale_shift" if "scale-shift norm True" in text else "default",
        use_in_shortcut="state_dict.skip_connection.weight" in values,
    )
    state = {}
    for name, value in values.items():
        if name.startswith("state_dict."):
            module, _, kind = name.removeprefix("state_dict.").rpartition(".")
            state[f"{NAMES[module]}.{kind}"] = value.clone()
    block.load_state_dict(state)
    block.requires_grad_(False)
    for name in learned_layers(BLOCK) + nearest_layers():
        layer = quantized_layer(block.get_submodule(NAMES[name]), bits(BLOCK), 32, StepTracker())
        layer.find_weight_range("search")
        block.set_submodule(NAMES[name], layer)
    for name in nearest_layers():
        block.get_submodule(NAMES[name]).fold()
    return block


def to_learn(block):
    return [block.get_submodule(NAMES[name]) for name in learned_layers(BLOCK)]


def block_loss(block, rows=slice(None)):
    values = tensors(BLOCK)
    output = block(values["x"][rows], values["emb"][rows])
    return reconstruction_loss(output, values["target"][rows], 2.0)


@pytest.fixture(scope="module")
def learned_block():
    """The block after learning on the recorded batches, and what was recorded on the way."""
    block = residual_block()
    recorded = Recorded(to_learn(block), BLOCK)
    loss = recorded.watch(lambda rows: block_loss(block, rows))
    with learning(BLOCK):
        trace = learn_rounding(recorded.layers, loss, iter(tensors(BLOCK)["idx"]), recorded.config)
    return block, recorded, trace


def test_block_starts_where_the_published_one_does():
    values = tensors(BLOCK)
    block = residual_block()
    layers = to_learn(block)
    for name, layer in zip(learned_layers(BLOCK), layers, strict=True):
        torch.testing.assert_close(layer.weight_scale[:, 0], values[f"{name}.delta"].reshape(-1), rtol=1e-6, atol=0)
        assert torch.equal(layer.weight_zero_point[:, 0], values[f"{name}.zero_point"].reshape(-1))
    for name in nearest_layers():
        torch.testing.assert_close(block.get_submodule(NAMES[name]).weight.data, values[f"{name}.w_nearest"])
    with torch.no_grad():
        for layer in layers:
            layer.learn_rounding()
        assert_starts_alike(block_loss(block), "loss.soft_start", BLOCK)
        for layer in layers:
            layer.fold()
        assert_starts_alike(block_loss(block), "loss.hard_start", BLOCK)
        nearest = residual_block()
        for layer in to_learn(nearest):
            layer.fold()
        assert_starts_alike(block_loss(nearest), "loss.nearest", BLOCK)


def test_block_is_learned_as_well_as_published(learned_block):
    block, recorded, _ = learned_block
    assert_learned_as_well_as_published(block_loss(block), BLOCK)
    assert all(layer.codes is not None and layer.rounding is None for layer in recorded.layers)


def test_block_follows_the_published_trace(learned_block):
    _, recorded, trace = learned_block
    assert trace == recorded.reconstruction
    assert_follows_published_trace(recorded, BLOCK)


# -- batches and loops ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [BLOCK, TIME])
def test_batches_equal_the_published_ones(case):
    values = tensors(case)
    rows = len(values["target"] if case == BLOCK else values["t"])
    iterations, batch = values["idx"].shape
    batches = random_batches(rows, batch, iterations, torch.Generator().manual_seed(seed(case)))
    assert torch.equal(torch.stack(list(batches)), values["idx"])


def test_batches_never_repeat_a_row_and_end_where_rows_do():
    generator = torch.Generator().manual_seed(0)
    batches = list(random_batches(5, 32, 3, generator))
    assert [sorted(batch.tolist()) for batch in batches] == [[0, 1, 2, 3, 4]] * 3


def small_layer():
    """A linear layer with ranges, ready to learn, and its loss against full precision on 8 rows."""
    torch.manual_seed(0)
    layer = quantized_layer(torch.nn.Linear(5, 3).requires_grad_(False), 3, 32, StepTracker())
    layer.find_weight_range("minmax")
    x = torch.randn(8, 5)
    target = layer(x)
    return layer, lambda rows: reconstruction_loss(layer(x[rows]), target[rows], 2.0)


@pytest.mark.parametrize("iterations", [1, 3])
def test_learning_rounds_for_good_after_few_iterations(iterations):
    layer, loss = small_layer()
    config = RoundingConfig(iterations=iterations, batch=4)
    batches = random_batches(8, 4, iterations, torch.Generator().manual_seed(0))
    trace = learn_rounding([layer], loss, batches, config)
    assert len(trace) == iterations and layer.rounding is None and layer.codes is not None
    assert not layer.weight.requires_grad


def test_iterations_count_from_1(monkeypatch):
    seen = []

    def watched_beta(iteration, iterations, warmup):
        seen.append((iteration, iterations, warmup))
        return annealed_beta(iteration, iterations, warmup)

    monkeypatch.setattr(reconstruction, "annealed_beta", watched_beta)
    layer, loss = small_layer()
    batches = random_batches(8, 4, 3, torch.Generator().manual_seed(0))
    learn_rounding([layer], loss, batches, RoundingConfig(iterations=3, batch=4, warmup=0.3))
    assert seen == [(1, 3, 0.3), (2, 3, 0.3), (3, 3, 0.3)]


def test_learned_step_sizes_lower_the_loss_and_stay_positive():
    torch.manual_seed(0)
    x = torch.randn(64, 6)
    quantizer = FakeQuantize(3, StepTracker())
    quantizer.observe()
    quantizer(x)
    quantizer.freeze()
    start = reconstruction_loss(quantizer(x), x, 2.4)
    before = quantizer.scale.clone()
    config = StepSizeConfig(iterations=60, batch=32, learning_rate=0.05)
    batches = random_batches(64, 32, config.iterations, torch.Generator().manual_seed(0))
    trace = learn_step_sizes(
        [quantizer], lambda rows: reconstruction_loss(quantizer(x[rows]), x[rows], 2.4), batches, config
    )
    assert len(trace) == config.iterations
    assert reconstruction_loss(quantizer(x), x, 2.4) < start
    assert quantizer.scale.shape == before.shape and (quantizer.scale > 0).all() and quantizer.scale != before
    assert not quantizer.scale.requires_grad


def test_a_step_size_driven_to_zero_ends_at_its_start():
    quantizer = FakeQuantize(4, StepTracker())
    quantizer.scale, quantizer.enabled = torch.tensor([0.01]), True
    x = torch.linspace(0, 1, 20)[:, None]
    config = StepSizeConfig(iterations=5, batch=20, learning_rate=1.0)
    batches = random_batches(20, 20, config.iterations, torch.Generator().manual_seed(0))
    learn_step_sizes([quantizer], lambda rows: quantizer(x[rows]).sum(), batches, config)
    assert quantizer.scale == torch.tensor([0.01])
