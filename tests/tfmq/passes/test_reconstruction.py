import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from tfmq.journal import Effort
from tfmq.passes.temporal import reconstruct_temporal

from tests.tfmq.oracle import regularizer, tensors
from tfmq.modules.fake_quantize import FakeQuantize, StepTracker
from tfmq.modules.layers import quantized_layer
from tfmq.network.unet import UNetLayout, temporal_features
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
from tfmq.plan import LayerPlan, QuantizationPlan, insert_quantizers, quantized_layers

BITS = 4
# The originals drew their batches from torch's global generator with these seeds; ours has a generator of its own.
BLOCK, BLOCK_SEED = "09a_block_reconstruction", 7
TIME, TIME_SEED = "09b_time_embedding_reconstruction", 11
PROJECTIONS = 3


def rounding_config(case):
    iterations, batch = tensors(case)["idx"].shape
    return RoundingConfig(iterations=iterations, batch=batch)


class Recorded:
    """What happens while ``learn_rounding`` runs on ``layers``; wrap the loss in ``watch``."""

    def __init__(self, layers, config):
        self.layers, self.config = layers, config
        self.reconstruction, self.penalty, self.after_10 = [], [], []

    def watch(self, loss):
        def watched(rows):
            self.roundings = [layer.rounding for layer in self.layers]
            if len(self.reconstruction) == 10:
                self.after_10 = [rounding.alpha.detach().clone() for rounding in self.roundings]
            value = loss(rows)
            beta = annealed_beta(len(self.reconstruction) + 1, self.config.iterations, self.config.warmup)
            penalty = 0.0 if beta is None else sum(float(regularizer(r.h, beta)) for r in self.roundings)
            self.reconstruction.append(value.item())
            self.penalty.append(self.config.regularizer_weight * penalty)
            return value

        return watched


# -- a residual block -------------------------------------------------------------------------------------------------

BLOCK_NAMES = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
}
LEARNED = {"conv1": "in_layers.2", "conv2": "out_layers.3"}


def residual_block():
    """The recorded block: two convolutions to be rounded, its embedding projection already rounded to nearest."""
    values = tensors(BLOCK)
    channels, embedding = values["x"].shape[1], values["emb"].shape[1]
    block = ResnetBlock2D(in_channels=channels, temb_channels=embedding, groups=32, eps=1e-5)
    for ours, theirs in BLOCK_NAMES.items():
        for kind in ("weight", "bias"):
            getattr(block.get_submodule(ours), kind).data = values[f"state_dict.{theirs}.{kind}"].clone()
    block.requires_grad_(False)
    for name in ("conv1", "conv2", "time_emb_proj"):
        layer = quantized_layer(block.get_submodule(name), BITS, 32, StepTracker())
        layer.find_weight_range("search")
        block.set_submodule(name, layer)
    block.time_emb_proj.fold()
    return block


def block_loss(block, rows=slice(None)):
    values = tensors(BLOCK)
    output = block(values["x"][rows], values["emb"][rows])
    return reconstruction_loss(output, values["target"][rows], 2.0)


@pytest.fixture(scope="module")
def learned_block():
    """The block after learning on the recorded batches, and what was recorded on the way."""
    block = residual_block()
    config = rounding_config(BLOCK)
    recorded = Recorded([block.conv1, block.conv2], config)
    loss = recorded.watch(lambda rows: block_loss(block, rows))
    trace = learn_rounding(recorded.layers, loss, iter(tensors(BLOCK)["idx"]), config)
    return block, recorded, trace


def test_block_starts_where_the_published_one_does():
    values = tensors(BLOCK)
    block = residual_block()
    for ours, theirs in LEARNED.items():
        layer = block.get_submodule(ours)
        torch.testing.assert_close(layer.weight_scale[:, 0], values[f"{theirs}.delta"].reshape(-1), rtol=1e-6, atol=0)
        assert torch.equal(layer.weight_zero_point[:, 0], values[f"{theirs}.zero_point"].reshape(-1))
    torch.testing.assert_close(block.time_emb_proj.weight.data, values["emb_layers.1.w_nearest"])
    layers = [block.conv1, block.conv2]
    with torch.no_grad():
        for layer in layers:
            layer.learn_rounding()
        torch.testing.assert_close(block_loss(block), values["loss.soft_start"], rtol=1e-3, atol=0)
        for layer in layers:
            layer.fold()
        torch.testing.assert_close(block_loss(block), values["loss.hard_start"], rtol=1e-3, atol=0)
        nearest = residual_block()
        nearest.conv1.fold()
        nearest.conv2.fold()
        torch.testing.assert_close(block_loss(nearest), values["loss.nearest"], rtol=1e-3, atol=0)


def test_block_is_learned_as_well_as_published(learned_block):
    block, _, _ = learned_block
    assert_learned_as_well_as_published(block_loss(block), tensors(BLOCK))
    assert all(layer.codes is not None and layer.rounding is None for layer in (block.conv1, block.conv2))


def test_block_follows_the_published_trace(learned_block):
    _, recorded, trace = learned_block
    assert trace == recorded.reconstruction
    assert_follows_published_trace(recorded, LEARNED.values(), tensors(BLOCK))


def assert_learned_as_well_as_published(loss, values):
    worst = max(values["loss.hard_end"], values["loss.hard_end_other_seeds"].max())
    assert loss <= 1.02 * worst and loss < values["loss.nearest"]


def assert_follows_published_trace(recorded, names, values):
    first = slice(0, 50)
    for found, name in ((recorded.reconstruction, "rec"), (recorded.penalty, "round")):
        torch.testing.assert_close(torch.tensor(found[first]), values[f"trace.{name}"][first], rtol=1e-2, atol=0)
    torch.testing.assert_close(torch.tensor(recorded.penalty), values["trace.round"], rtol=1e-2, atol=1e-6)
    # Adam turns the float error of a gradient near 0 into a step of its own, so a few alphas may part.
    for rounding, alpha, name in zip(recorded.roundings, recorded.after_10, names, strict=True):
        for found, stage in ((alpha, "after_10"), (rounding.alpha, "end")):
            close = (found - values[f"{name}.alpha_{stage}"]).abs() <= 1e-3
            assert close.float().mean() >= 0.995


# -- the temporal information block -----------------------------------------------------------------------------------

TIME_NAMES = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    **{f"down_blocks.{i}.resnets.0.time_emb_proj": f"input_blocks.{i + 1}.0.emb_layers.1" for i in range(PROJECTIONS)},
}


def time_unet():
    """A UNet whose first three residual blocks have the recorded time embedding, its copy, and the recorded layout.

    The recorded run leaves the first linear layer of the time embedding in full precision.
    """
    values = tensors(TIME)
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=tuple(values[f"target{i}"].shape[1] for i in range(PROJECTIONS)),
        time_embedding_dim=values["state_dict.time_embed.0.weight"].shape[0],
        down_block_types=("DownBlock2D",) * PROJECTIONS,
        up_block_types=("UpBlock2D",) * PROJECTIONS,
        mid_block_type=None,
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=8,
    )
    for ours, theirs in TIME_NAMES.items():
        for kind in ("weight", "bias"):
            getattr(unet.get_submodule(ours), kind).data = values[f"state_dict.{theirs}.{kind}"].clone()
    unet.eval().requires_grad_(False)
    full = copy.deepcopy(unet)
    learned = tuple(TIME_NAMES)[1:]
    layout = replace(UNetLayout.of(unet), time_embedding=learned[:1], time_projections=learned[1:])
    insert_quantizers(unet, QuantizationPlan({path: LayerPlan(BITS, 32) for path in learned}, {}))
    for layer in quantized_layers(unet).values():
        layer.find_weight_range("search")
    return SimpleNamespace(unet=unet, full=full, layout=layout, timesteps=values["t"].long())


def time_losses(network):
    """Loss of each projection over all recorded rows."""
    with torch.no_grad():
        features = temporal_features(network.unet, network.layout, network.timesteps)
        targets = temporal_features(network.full, network.layout, network.timesteps)
    return torch.stack([reconstruction_loss(f, t, 2.0) for f, t in zip(features, targets, strict=True)])


@pytest.fixture(scope="module")
def learned_time():
    """The network after ``reconstruct_temporal`` with the recorded seed, the loss terms on the way, and the effort."""
    network = time_unet()
    config = rounding_config(TIME)
    recorded = Recorded([network.unet.get_submodule(path) for path in network.layout.temporal], config)
    effort = Effort()

    def watched_learning(layers, loss, batches, settings):
        return learn_rounding(layers, recorded.watch(loss), batches, settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reconstruction, "learn_rounding", watched_learning)
        generator = torch.Generator().manual_seed(TIME_SEED)
        reconstruct_temporal(network.unet, network.full, network.layout, network.timesteps, config, generator, effort)
    return network, recorded, effort


def test_time_embedding_starts_where_the_published_one_does():
    values = tensors(TIME)
    network = time_unet()
    distinct = network.timesteps[:: len(network.timesteps) // len(values["sinusoid"])]
    torch.testing.assert_close(network.full.time_proj(distinct), values["sinusoid"], rtol=1e-4, atol=1e-4)
    for i, feature in enumerate(temporal_features(network.full, network.layout, distinct)):
        torch.testing.assert_close(feature, values[f"target{i}"], rtol=1e-4, atol=1e-4)
    layers = [network.unet.get_submodule(path) for path in network.layout.temporal]
    for path, layer in zip(network.layout.temporal, layers, strict=True):
        theirs = TIME_NAMES[path]
        torch.testing.assert_close(layer.weight_scale, values[f"{theirs}.delta"], rtol=1e-6, atol=0)
        assert torch.equal(layer.weight_zero_point, values[f"{theirs}.zero_point"])
        layer.learn_rounding()
    torch.testing.assert_close(time_losses(network).sum(), values["loss.soft_start"], rtol=1e-3, atol=0)
    for layer in layers:
        layer.fold()
    torch.testing.assert_close(time_losses(network).sum(), values["loss.hard_start"], rtol=1e-3, atol=0)
    network = time_unet()
    for layer in quantized_layers(network.unet).values():
        layer.fold()
    torch.testing.assert_close(time_losses(network).sum(), values["loss.nearest"], rtol=1e-3, atol=0)


def test_time_embedding_is_learned_as_well_as_published(learned_time):
    network, _, effort = learned_time
    assert_learned_as_well_as_published(time_losses(network).sum(), tensors(TIME))
    assert effort == Effort(unet_evaluations=0, optimizer_steps=rounding_config(TIME).iterations)
    assert all(layer.codes is not None for layer in quantized_layers(network.unet).values())


def test_time_embedding_follows_the_published_trace(learned_time):
    network, recorded, _ = learned_time
    names = [TIME_NAMES[path] for path in network.layout.temporal]
    assert_follows_published_trace(recorded, names, tensors(TIME))


# -- batches and loops ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "seed"), [(BLOCK, BLOCK_SEED), (TIME, TIME_SEED)])
def test_batches_equal_the_published_ones(case, seed):
    values = tensors(case)
    rows = len(values["target"] if case == BLOCK else values["t"])
    iterations, batch = values["idx"].shape
    batches = random_batches(rows, batch, iterations, torch.Generator().manual_seed(seed))
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
