"""What a quantisation costs is planned from shapes: evaluations, steps and what waits exactly, the rest estimated."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from tests.tfmq import networks, originals
from tfmq.cost import Planned, plan_cost
from tfmq.live_bytes import LiveBytes
from tfmq.network.backbone import backbone_of
from tfmq.network.calibration import CalibrationRows, CalibrationSet, Spaced
from tfmq.network.offload import stream_bytes
from tfmq.network.sampling import SamplingSettings
from tfmq.network.unet import UNet
from tfmq.passes import Cost, Memory, Recipe
from tfmq.passes.activation_ranges import ActivationRanges
from tfmq.passes.channel_scales import ScaleChannels
from tfmq.passes.grids import Grids
from tfmq.passes.low_rank import LowRankBranches
from tfmq.passes.noise_distillation import NoiseDistillation
from tfmq.passes.predicted_step_sizes import PredictedStepSizes
from tfmq.passes.recalibration import Recalibration
from tfmq.passes.reconstruction import RoundingConfig, StepSizeConfig
from tfmq.passes.step_network import FitConfig
from tfmq.passes.training import QuantizationAwareTraining, TrainingConfig
from tfmq.passes.weight_ranges import RoundToNearest, WeightRanges
from tfmq.plan import quantized_layers
from tfmq.precision import Precision
from tfmq.quantization import quantize_
from tfmq.workspace import Workspace

W4A8 = Precision.parse("w4a8")
ROUNDING = RoundingConfig(iterations=1, batch=8)
STEP_SIZES = StepSizeConfig(iterations=1, batch=8)
PREDICTED = PredictedStepSizes(FitConfig(iterations=2, batch=8), Spaced(5, 4), values=8)


def pool_for(unet: UNet) -> CalibrationSet:
    """A pool of 5 steps and 4 images, with a context where the network takes one."""
    pool = networks.pool(networks.unconditional())
    return replace(pool, context=torch.zeros(4, 5, 12)) if hasattr(unet, "encoder_hid_proj") else pool


def meta(build: Callable[[], UNet] = networks.unconditional) -> UNet:
    return build().to("meta")


def of(planned: Planned, name: str) -> Memory:
    """The memory of the pass of that name."""
    (found,) = [memory for (each, _), memory in zip(planned.costs, planned.memories, strict=True) if each == name]
    return found


# -- evaluations and steps --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["w4a8", "w4a32"])
@pytest.mark.parametrize("scales", ["shared", "temporal", "per_step"])
@pytest.mark.parametrize("temporal", [None, ROUNDING])
def test_each_pass_spends_what_was_planned(temporal, scales, precision):
    recipe = networks.recipe(rounding=ROUNDING, temporal=temporal, scales=scales, step_sizes=STEP_SIZES)
    _, full, pool, report = networks.quantized(recipe, precision)
    planned = plan_cost(full.to("meta"), Precision.parse(precision), recipe, pool, memory=False)
    assert [(name, cost.unet_evaluations, cost.optimizer_steps) for name, cost in planned.costs] == [
        (spent.name, spent.unet_evaluations, spent.optimizer_steps) for spent in report.passes
    ]
    assert replace(planned.cost, learned_rows=0) == report.cost
    learns_scales = precision == "w4a8" and scales != "per_step"
    assert planned.cost.learned_rows == 8 + 8 * learns_scales


def test_costs_are_added():
    assert Cost(1, 2, 3) + Cost(10, 20, 30) == Cost(11, 22, 33)
    assert Planned((("a", Cost(1, 2, 3)), ("b", Cost(4))), 0).cost == Cost(5, 2, 3)


def test_planning_changes_neither_network_nor_pool():
    unet = meta()
    pool = pool_for(unet)
    before = copy.deepcopy(pool.tensors)
    plan_cost(unet, W4A8, networks.recipe(rounding=ROUNDING, split_shortcuts=True), pool)
    assert not quantized_layers(unet) and not unet._forward_pre_hooks
    assert all(torch.equal(tensor, before[name]) for name, tensor in pool.tensors.items())


def test_a_pool_on_the_meta_device_will_do():
    unet = meta()
    pool = pool_for(unet)
    shapes = {name: tensor.to("meta") for name, tensor in pool.tensors.items() if name in ("latents", "noise")}
    recipe = networks.recipe(rounding=ROUNDING, step_sizes=STEP_SIZES, data=Spaced(5, 4, shuffled=True))
    assert plan_cost(unet, W4A8, recipe, replace(pool, **shapes)) == plan_cost(unet, W4A8, recipe, pool)


def test_networks_with_weights_are_refused():
    unet = networks.unconditional()
    with pytest.raises(ValueError, match="on the meta device, and this one is on cpu"):
        plan_cost(unet, W4A8, networks.recipe(), pool_for(unet))


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [networks.unconditional, networks.conditional])
def test_a_row_takes_on_the_meta_device_what_it_takes_in_memory(build):
    unet = build()
    row = pool_for(unet).spaced(1, 1)
    planned = stream_bytes(copy.deepcopy(unet).to("meta"), backbone_of(unet), row.to(torch.device("meta")))
    assert planned == stream_bytes(unet, backbone_of(unet), row)


def test_a_row_of_the_bedrooms_network_takes_what_its_shapes_say():
    unet = originals.full_size("ldm4_lsun_bedrooms")
    config = unet.config
    side, (last, before, *_) = config.sample_size, config.block_out_channels
    row = CalibrationRows(torch.empty(1, config.in_channels, side, side, device="meta"), torch.tensor([1]))
    waiting = (config.layers_per_block + 1) * last
    # The last stage of the way up: channels of the one before come in, others wait on the stack, its own go out.
    assert stream_bytes(unet, backbone_of(unet), row) == (before + waiting + last) * side * side * 4


def test_networks_and_waiting_rows_are_those_of_a_quantisation():
    unet = networks.unconditional()
    pool = pool_for(unet)
    recipe = networks.recipe(rounding=ROUNDING, memory_bytes=1)
    planned = plan_cost(copy.deepcopy(unet).to("meta"), W4A8, recipe, pool)
    memory = of(planned, "block reconstruction")
    assert planned.held == planned.networks + planned.rows + memory.held and memory.held > 0
    assert planned.on_disk == memory.on_disk
    allocated = []

    def allocate(elements: int, dtype: torch.dtype) -> torch.Tensor:
        allocated.append(elements * dtype.itemsize)
        return torch.empty(elements, dtype=dtype)

    workspace = Workspace()
    workspace.allocate = allocate
    quantize_(unet, W4A8, recipe, pool, networks.generator(), workspace=workspace)
    assert max(allocated) < planned.on_disk < sum(allocated)


def test_rows_wait_and_batches_count_where_something_is_learned():
    unet = meta()
    pool = pool_for(unet)

    def planned(images: int = 4, precision: Precision = W4A8, **learned: object) -> Planned:
        """With rows that wait on a disk, so that what is held is what a block takes; ranges take 4 rows."""
        recipe = networks.recipe(**learned, data=Spaced(5, images), memory_bytes=1)
        few = tuple(replace(s, data=Spaced(1, 4)) if isinstance(s, ActivationRanges) else s for s in recipe)
        return plan_cost(unet, precision, few, pool)

    nearest = planned()
    ranges = of(nearest, "activation ranges").held
    assert nearest.on_disk == 0 < nearest.held - nearest.networks - nearest.rows == ranges
    weights_alone = planned(precision=Precision.parse("w4a32"))
    assert weights_alone.held - weights_alone.networks - weights_alone.rows == of(weights_alone, "weight ranges").held
    learned = planned(rounding=ROUNDING)
    assert learned.on_disk == 2 * planned(step_sizes=STEP_SIZES).on_disk > 0
    assert learned.on_disk == 2 * planned(2, rounding=ROUNDING).on_disk
    assert learned.held > nearest.held and learned.networks == nearest.networks
    more = planned(rounding=replace(ROUNDING, batch=16))
    block, larger = (of(each, "block reconstruction").held for each in (learned, more))
    assert block < larger < 2 * block


def test_rows_that_fit_wait_in_memory():
    unet = meta()
    pool = pool_for(unet)
    here, there = (
        of(plan_cost(unet, W4A8, networks.recipe(rounding=ROUNDING, memory_bytes=most), pool), "block reconstruction")
        for most in (2**30, 1)
    )
    # What waits and what a block takes are not at their most at the same block.
    assert here.on_disk == 0 < there.on_disk and there.held < here.held < there.held + there.on_disk


RECIPES = {
    "learned": networks.recipe(rounding=ROUNDING, temporal=ROUNDING, scales="temporal", step_sizes=STEP_SIZES),
    "low-rank": (
        Grids(weight_group=8, dynamic_activations=True),
        LowRankBranches(4, 2, 8, data=Spaced(2, 4)),
        WeightRanges("minmax"),
        RoundToNearest(),
    ),
    "recalibrated": (
        ScaleChannels(data=Spaced(5, 4)),
        *networks.recipe(rounding=ROUNDING),
        Recalibration(2, ROUNDING, STEP_SIZES, Spaced(5, 4)),
    ),
    "step networks": (WeightRanges(), RoundToNearest(), PREDICTED),
    "distilled": (
        *networks.recipe(scales="temporal"),
        NoiseDistillation(2, 16, rounding_rate=0.01, data=Spaced(5, 4)),
    ),
    "training": (QuantizationAwareTraining(TrainingConfig(iterations=2, batch=8), PREDICTED),),
}


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_planned_to_be_held_is_what_lives_at_once_in_a_quantisation(name, monkeypatch):
    """All tensors of a quantisation are counted, on the CPU, but for those of the pool."""
    # Of ranges for weights as small as here, as many are tried at once as fill a MiB: more than all else.
    monkeypatch.setattr("tfmq.numerics.observer.SEARCH_CANDIDATES", 1)
    build, recipe = networks.conditional, RECIPES[name]
    pool = networks.KINDS["class"].pool(build())
    planned = plan_cost(meta(build), W4A8, recipe, pool)
    gc.collect()
    with LiveBytes() as live:
        quantize_(build(), W4A8, recipe, pool, networks.generator())
    assert planned.held == pytest.approx(live.most, rel=0.1)


@pytest.mark.parametrize("recipe", [(), (Grids(weight_group=4, dynamic_activations=True), LowRankBranches(4, 2, 8))])
def test_networks_are_held_with_their_codes_groups_and_branches(recipe):
    unet = networks.unconditional()
    weights, pool = sum(parameter.nbytes for parameter in unet.parameters()), pool_for(unet)
    recipe = (*recipe, WeightRanges("minmax"), RoundToNearest(), *(() if recipe else (ActivationRanges(),)))
    planned = plan_cost(copy.deepcopy(unet).to("meta"), W4A8, recipe, pool)
    quantize_(unet, W4A8, recipe, pool, networks.generator())
    assert planned.networks == weights + sum(tensor.nbytes for tensor in (*unet.parameters(), *unet.buffers()))


def test_drawn_rows_are_held():
    unet = meta()
    pool = pool_for(unet)
    recipes = [networks.recipe(data=Spaced(5, images)) for images in (1, 4)]
    few, many = (plan_cost(unet, W4A8, recipe, pool, memory=False) for recipe in recipes)
    assert many.rows == 4 * few.rows == 5 * 4 * (3 * 8 * 8 * 4 + 8), "latents, and time steps of 64 bits"


class Unknown(RoundToNearest):
    """A pass that cannot say what it holds."""

    def memory(self, shapes: object, rows: object) -> None:
        return None


def test_memory_that_is_not_known_or_not_planned_is_not_made_up():
    unet = meta()
    recipe: Recipe = (Grids(), WeightRanges(), Unknown(), ActivationRanges())
    planned = plan_cost(unet, W4A8, recipe, pool_for(unet))
    assert planned.held is None and planned.on_disk is None and planned.networks > 0
    assert [memory is None for memory in planned.memories] == [False, False, True, False]
    with pytest.raises(ValueError, match="memory was not planned: call plan_cost with memory=True"):
        _ = plan_cost(unet, W4A8, recipe, pool_for(unet), memory=False).held


def test_attention_in_floating_point_takes_no_matrix_of_probabilities():
    unet = meta(networks.conditional)
    latents = torch.empty(8, 1, unet.config.in_channels, 64, 64, device="meta")
    alphas, context = torch.linspace(0.1, 1, 9, dtype=torch.float64), torch.empty(1, 5, 12, device="meta")
    pool = CalibrationSet(latents, torch.arange(8), latents, latents[0], alphas, SamplingSettings(8), context)
    recipe = networks.recipe(rounding=ROUNDING, data=Spaced(8, 1), memory_bytes=1)
    planned = plan_cost(unet, Precision.parse("w4a32"), recipe, pool)
    assert planned.held - planned.networks < 8 * 4 * (64 * 64) ** 2
