"""The front door, on tiny networks: what a recipe leaves behind, what is reported, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import pytest
import torch

from tests.tfmq import networks
from tfmq.checkpoint import save_quantized
from tfmq.modules.layers import QuantizedLayer
from tfmq.network.backbone import backbone_of
from tfmq.network.calibration import CalibrationRows
from tfmq.network.unet import UNet
from tfmq.passes import Pass, Recipe
from tfmq.passes.activation_ranges import ActivationRanges
from tfmq.passes.block_reconstruction import BlockReconstruction
from tfmq.passes.correction import MeasureCorrection
from tfmq.passes.reconstruction import RoundingConfig, StepSizeConfig
from tfmq.passes.step_sizes import StepSizes
from tfmq.passes.temporal_cache import TemporalCache
from tfmq.passes.weight_ranges import RoundToNearest, WeightRanges
from tfmq.plan import Protocol, activation_quantizers, quantized_layers
from tfmq.precision import Precision
from tfmq.quantization import quantize_
from tfmq.session import Session, Spent
from tfmq.state import coverage

ROUNDING = RoundingConfig(iterations=4, batch=8, learning_rate=1e-2)
W4A8 = Precision.parse("w4a8")


def test_every_weight_is_on_its_grid_and_every_quantizer_is_frozen():
    recipe = networks.recipe(rounding=ROUNDING, temporal=ROUNDING, split_shortcuts=True)
    unet, _, _, report = networks.quantized(recipe)
    for path, layer in quantized_layers(unet).items():
        assert layer.codes.max() <= (255 if path in ("conv_in", "conv_out") else 15), path
        scale, point = layer.spread(layer.weight_scale), layer.spread(layer.weight_zero_point)
        assert torch.equal((layer.codes - point) * scale, layer.weight), path
    assert all(quantizer.enabled and quantizer.observer is None for quantizer in activation_quantizers(unet).values())
    assert report.coverage == coverage(unet) and not any(row.reason for row in report.coverage)


def test_the_same_generator_gives_the_same_network():
    recipe = networks.recipe(rounding=ROUNDING, step_sizes=StepSizeConfig(iterations=3, batch=8))
    first, second = (networks.quantized(recipe)[0].state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_report_counts_every_evaluation_and_step_of_each_pass():
    step_sizes = StepSizeConfig(iterations=3, batch=8)
    _, full, _, report = networks.quantized(
        networks.recipe(rounding=ROUNDING, temporal=ROUNDING, step_sizes=step_sizes)
    )
    blocks = len(backbone_of(full).blocks)
    # 20 rows: twice through weight reconstruction, once for ranges, once through step-size learning.
    assert report.cost.unet_evaluations == 20 * 4
    assert report.cost.optimizer_steps == 4 + 4 * blocks + 3 * (2 + blocks)
    assert [replace(spent, seconds=0) for spent in report.passes] == [
        Spent("grids"),
        Spent("weight ranges"),
        Spent("temporal reconstruction", optimizer_steps=4),
        Spent("block reconstruction", unet_evaluations=40, optimizer_steps=4 * blocks),
        Spent("round to nearest"),
        Spent("activation ranges", unet_evaluations=20),
        Spent("step sizes", unet_evaluations=20, optimizer_steps=3 * (2 + blocks)),
    ]
    assert report.seconds == {spent.name: spent.seconds for spent in report.passes}
    assert all(spent.seconds > 0 for spent in report.passes)


def test_seconds_of_two_passes_of_one_name_are_added():
    recipe = (WeightRanges("minmax"), WeightRanges("search"), RoundToNearest())
    _, _, _, report = networks.quantized(recipe, "w4a32")
    assert [spent.name for spent in report.passes] == ["weight ranges", "weight ranges", "round to nearest"]
    assert report.seconds["weight ranges"] == report.passes[0].seconds + report.passes[1].seconds


@pytest.mark.parametrize("kind", ["class", "text"])
def test_conditional_networks_are_quantised_too(kind):
    kind = networks.KINDS[kind]
    recipe = networks.recipe(rounding=ROUNDING, temporal=ROUNDING, scales="temporal")
    unet, full, pool, _ = networks.quantized(recipe, build=kind.build, recorded=kind.pool(kind.build()))
    rows = pool.spaced(5, 4)
    with torch.no_grad():
        expected = full(rows.latents, rows.timesteps, rows.context).sample
        error = (unet(rows.latents, rows.timesteps, rows.context).sample - expected).norm() / expected.norm()
    assert 0 < error < 0.5
    tables = {path.removesuffix(".input_quantizer") for path, q in activation_quantizers(unet).items() if q.per_step}
    assert tables == {path for path in quantized_layers(unet) if "time_emb" in path}, "a context is no temporal feature"
    assert all(
        isinstance(m, QuantizedLayer) for m in unet.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)
    )


def test_what_a_pass_learns_does_not_move_what_a_later_one_draws():
    """All rows are drawn before the first pass runs, so that longer learning is measured on the same rows."""
    seen = []

    def draw(pool, generator):
        seen.append(pool.spaced(5, 4).shuffled(generator))
        return seen[-1]

    for iterations in (1, 3):
        data = networks.ALL_ROWS
        learning = networks.recipe(rounding=replace(ROUNDING, iterations=iterations), data=data)
        networks.quantized(tuple(replace(s, data=draw) if isinstance(s, ActivationRanges) else s for s in learning))
    first, second = seen
    assert torch.equal(first.latents, second.latents)


# -- failures ---------------------------------------------------------------------------------------------------------


def test_nan_weights_are_named():
    unet = networks.unconditional()
    with torch.no_grad():
        unet.conv_out.bias[1] = float("inf")
    pool = networks.pool(networks.unconditional())
    with pytest.raises(ValueError, match=r"conv_out\.bias holds NaN or infinity: the checkpoint is damaged"):
        quantize_(unet, W4A8, networks.recipe(), pool, networks.generator())


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
        networks.quantized(networks.recipe(), build=dead_layer)


@pytest.mark.parametrize(
    ("build", "recipe", "error"),
    [
        (dead_layer, networks.recipe(rounding=ROUNDING, scales="temporal"), ValueError),  # constant activations
        (
            networks.unconditional,
            (TemporalCache("all"), *networks.recipe(rounding=RoundingConfig(iterations=2, norm=1e5))),
            ValueError,
        ),
        (networks.unconditional, networks.recipe(step_sizes=StepSizeConfig(iterations=2)), KeyboardInterrupt),
        (networks.unconditional, networks.recipe()[:-1], ValueError),  # activations without ranges
    ],
)
@torch.no_grad()
def test_after_a_failure_the_network_is_what_it_was(build, recipe, error, monkeypatch, tmp_path):
    unet = build()
    before = copy.deepcopy(unet)
    pool = networks.pool(networks.unconditional())
    rows = pool.spaced(5, 4)
    if error is KeyboardInterrupt:
        monkeypatch.setattr(StepSizes, "run", interrupted)
    with pytest.raises(error):
        quantize_(unet, W4A8, recipe, pool, networks.generator())
    assert unet.state_dict().keys() == before.state_dict().keys()
    assert all(torch.equal(tensor, before.state_dict()[name]) for name, tensor in unet.state_dict().items())
    assert torch.equal(unet(rows.latents, rows.timesteps).sample, before(rows.latents, rows.timesteps).sample)
    assert not quantized_layers(unet) and not unet._forward_pre_hooks and not hasattr(unet, "step_tracker")
    with pytest.raises(ValueError, match="the network is not quantised"):
        save_quantized(unet, tmp_path / "q.safetensors", {})
    monkeypatch.undo()
    quantize_(unet, Precision.parse("w4a32"), networks.recipe(), pool, networks.generator())
    assert quantized_layers(unet)


def with_rows(recipe: Recipe, kind: type, rows: CalibrationRows, other: CalibrationRows) -> Recipe:
    """``recipe`` whose pass of a kind draws ``rows``, and any other pass ``other``."""
    return tuple(
        replace(step, data=networks.drawing(rows if isinstance(step, kind) else other))
        if hasattr(step, "data")
        else step
        for step in recipe
    )


def test_rows_that_are_not_the_network_s_inputs_are_refused():
    unet, conditional = networks.unconditional(), networks.conditional()
    pool = networks.pool(unet)
    good = pool.spaced(5, 4)
    latents, timesteps = good.latents, good.timesteps
    context = torch.zeros(20, 5, 12)
    cases = [
        (unet, good[:0], "{name} draws no calibration row from the pool: let it draw at least one"),
        (
            unet,
            CalibrationRows(latents[:, :2], timesteps),
            r"latents of shape \(20, 2, 8, 8\): the network takes \(images, 3, height, width\)",
        ),
        (unet, CalibrationRows(latents[0], timesteps[:3]), r"latents of shape \(3, 8, 8\)"),
        (
            unet,
            CalibrationRows(latents, timesteps, context),
            r"the pool is conditioned on something of shape \(20, 5, 12\), and a UNet2DModel takes no condition",
        ),
        (conditional, good, "the pool is conditioned on nothing, and a UNet2DConditionModel takes a context"),
        (
            conditional,
            CalibrationRows(latents, timesteps, torch.zeros(20)),
            r"the pool is conditioned on something of shape \(20,\), and a UNet2DConditionModel takes a context",
        ),
    ]
    kinds = {"block reconstruction": BlockReconstruction, "activation ranges": ActivationRanges}
    for network, bad, message in cases:
        fine = good if network is unet else CalibrationRows(latents, timesteps, context)
        for name, kind in kinds.items():
            recipe = with_rows(networks.recipe(rounding=ROUNDING), kind, bad, fine)
            with pytest.raises(ValueError, match="^" + message.replace("{name}", name)):
                quantize_(network, W4A8, recipe, pool, networks.generator())
    empty = replace(pool, latents=pool.latents[:0], timesteps=pool.timesteps[:0], noise=pool.noise[:0])
    with pytest.raises(ValueError, match="activation ranges draws no calibration row"):
        quantize_(unet, W4A8, networks.recipe(), empty, networks.generator())
    assert not quantized_layers(unet) and not quantized_layers(conditional)


def test_a_recipe_that_leaves_something_unquantised_is_refused():
    unet = networks.unconditional()
    pool = networks.pool(unet)
    with pytest.raises(
        ValueError, match="leaves the weight of conv_in unrounded: add RoundToNearest after what learns"
    ):
        quantize_(unet, W4A8, (WeightRanges(), ActivationRanges()), pool, networks.generator())
    with pytest.raises(ValueError, match=r"activation at \S+ no range: add ActivationRanges"):
        quantize_(unet, W4A8, (WeightRanges(), RoundToNearest()), pool, networks.generator())
    assert not quantized_layers(unet)
    quantize_(unet, Precision.parse("w4a32"), (WeightRanges(), RoundToNearest()), pool, networks.generator())


def test_full_precision_weights_are_refused():
    with pytest.raises(ValueError, match="leaves the weights in full precision"):
        networks.quantized(networks.recipe(), "w32a8")


@pytest.mark.parametrize("text", ["w4", "8", "w4a8x", "W4A8", "w1a8", "w4a64"])
def test_bad_precisions_are_refused(text):
    with pytest.raises(ValueError):
        Precision.parse(text)


def test_a_quantised_network_is_not_quantised_again():
    unet, _, pool, _ = networks.quantized(networks.recipe())
    with pytest.raises(ValueError, match="quantised already"):
        quantize_(unet, W4A8, networks.recipe(), pool, networks.generator())


def test_a_loss_that_is_not_finite_stops_the_run():
    with pytest.raises(ValueError, match="reconstruction loss is (nan|inf) at iteration"):
        networks.quantized(networks.recipe(rounding=RoundingConfig(iterations=2, norm=1e5)))


@dataclass(frozen=True)
class Meddle(Pass):
    """Changes weights, in the place of a recipe where it stands."""

    def run(self, session: Session, rows: None) -> None:
        for layer in quantized_layers(session.network).values():
            with torch.no_grad():
                layer.weight *= 1.01


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ((RoundToNearest(),), "a weight has no range to be rounded in: let WeightRanges come before"),
        ((WeightRanges(),), "leaves the weight of conv_in unrounded: add RoundToNearest"),
        ((WeightRanges(), RoundToNearest()), "gives the activation at .* no range: add ActivationRanges"),
        ((MeasureCorrection(), *networks.recipe()), "unrounded before the pass measure correction: add RoundToNearest"),
        (
            (WeightRanges(), RoundToNearest(), TemporalCache(), ActivationRanges()),
            "gives the activation at .* no range before the pass temporal cache: add ActivationRanges",
        ),
        ((*networks.recipe(), Meddle()), "a pass changed the weight of conv_in after it was rounded|was changed after"),
    ],
)
def test_a_recipe_that_leaves_something_undone_is_refused(recipe, message):
    with pytest.raises(ValueError, match=message):
        networks.quantized(recipe)


def test_after_a_failure_the_generator_is_where_it_was():
    generator = networks.generator()
    before, unet = generator.get_state(), networks.unconditional()
    recipe = (*networks.recipe(rounding=ROUNDING), Meddle())
    with pytest.raises(ValueError, match="conv_in"):
        quantize_(unet, W4A8, recipe, networks.pool(networks.unconditional()), generator)
    assert torch.equal(generator.get_state(), before)


def test_a_folder_s_name_is_no_workspace():
    with pytest.raises(ValueError, match="workspace is 'learned': give a FolderWorkspace"):
        quantize_(
            networks.unconditional(), W4A8, (), networks.pool(networks.unconditional()), None, workspace="learned"
        )


@pytest.mark.parametrize(("bits", "inputs"), [({"boundary": 16}, {}), ({"boundary": 1}, {}), ({}, {"boundary": 17})])
def test_widths_that_codes_do_not_have_are_refused(bits, inputs):
    with pytest.raises(ValueError, match="choose 2 to"):
        Protocol("mine", bits, inputs)
