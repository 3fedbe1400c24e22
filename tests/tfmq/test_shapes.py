"""Whatever sizes and layouts a network's own forward pass takes can be quantised; all else is refused at once."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel
from torch import Tensor

from tests.tfmq import networks
from tests.tfmq.network.test_transformer import transformer
from tfmq.network.backbone import Network, backbone_of, evaluate
from tfmq.network.calibration import CalibrationRows, CalibrationSet, collect_calibration
from tfmq.network.offload import BlockStream, Place, waiting_bytes
from tfmq.network.sampling import Conditioning, SamplingSettings, sample
from tfmq.passes.grids import Grids
from tfmq.passes.low_rank import LowRankBranches
from tfmq.passes.reconstruction import RoundingConfig, StepSizeConfig
from tfmq.passes.weight_ranges import RoundToNearest, WeightRanges
from tfmq.plan import quantized_layers
from tfmq.precision import Precision
from tfmq.quantization import quantize_

W4A8 = Precision.parse("w4a8")
ROUNDING, STEP_SIZES = RoundingConfig(iterations=2, batch=3), StepSizeConfig(iterations=2, batch=3)
LEARNED = networks.recipe(rounding=ROUNDING, temporal=ROUNDING, scales="temporal", step_sizes=STEP_SIZES, batch=3)
SIZES = [(9, 9), (8, 12), (5, 7), (3, 11), (4, 4), (1, 6)]


def deep(seed: int = 0) -> UNet2DConditionModel:
    """Three levels: 9 pixels become 5 and then 3."""
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=8,
    ).eval()


def latents(size: tuple[int, int], images: int = 3) -> Tensor:
    return torch.randn(images, 3, *size, generator=networks.generator())


def context(images: int = 3, tokens: int = 5) -> Tensor:
    return torch.randn(images, tokens, 12, generator=networks.generator())


def recorded(network: Network, size: tuple[int, int], images: int = 3, tokens: int = 5) -> CalibrationSet:
    conditioning = None
    if isinstance(network, UNet2DConditionModel):
        conditioning = Conditioning(context(images, tokens))
    elif isinstance(network, DiTTransformer2DModel):
        conditioning = Conditioning(torch.arange(images))
    noise = latents(size, images)
    return collect_calibration(
        network, networks.scheduler(), noise, networks.SETTINGS, batch=images, conditioning=conditioning
    )


@torch.no_grad()
def streamed(network: Network, rows: CalibrationRows) -> Tensor:
    backbone = backbone_of(network)
    stream = BlockStream(network, backbone, rows, 2, Place(network.device))
    for block in backbone.blocks:
        stream.advance(block, stream.outputs(block, stream.inputs(block)))
    return stream.hidden


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("build", [networks.conditional, deep])
def test_block_by_block_is_the_stock_forward_pass_at_any_size(build, size):
    network, steps = build(), torch.tensor([1, 401, 801])
    with torch.no_grad():
        expected = network(latents(size), steps, context()).sample
    found = streamed(network, CalibrationRows(latents(size), steps, context()))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("build", "size", "images", "tokens"),
    [
        (deep, (9, 9), 3, 5),
        (deep, (5, 12), 2, 1),
        (networks.conditional, (9, 9), 1, 1),
        (networks.conditional, (4, 4), 3, 77),
        (networks.unconditional, (4, 12), 2, 0),
        (transformer, (4, 4), 2, 0),
        (transformer, (12, 12), 1, 0),
    ],
)
def test_everything_is_learned_at_any_size(build, size, images, tokens):
    network = build()
    full, pool = copy.deepcopy(network), recorded(network, size, images, tokens)
    quantize_(network, W4A8, LEARNED, pool, networks.generator())
    rows = pool.spaced(3, images)
    with torch.no_grad():
        found, expected = (evaluate(each, rows.latents, rows.timesteps, rows.context) for each in (network, full))
    assert found.shape == rows.latents.shape
    assert (found - expected).norm() < 0.5 * expected.norm()
    assert (streamed(network, rows) - found).norm() < 0.1 * found.norm(), "but for activations on the edge of a code"


def test_memory_is_planned_at_any_size():
    row = CalibrationRows(latents((9, 9), 1), torch.tensor([1]), context(1))
    on_meta = waiting_bytes(deep().to("meta"), backbone_of(deep()), row.to(torch.device("meta")))
    assert on_meta == waiting_bytes(deep(), backbone_of(deep()), row)
    paths = [block.path for block in backbone_of(deep()).blocks]
    waiting, coarse, fine = 2 * 8 * 81, 16 * 25, 16 * 81  # numbers of two skip connections, and before and after it
    assert on_meta[paths.index("up_blocks.1.upsamplers.0")] == 4 * (waiting + coarse + fine)


@pytest.mark.parametrize(("patch", "size"), [(1, 5), (2, 6), (4, 12), (3, 9)])
def test_a_transformer_of_any_patch_size(patch, size):
    torch.manual_seed(0)
    network = DiTTransformer2DModel(
        2, 8, in_channels=3, out_channels=3, num_layers=1, sample_size=12, patch_size=patch, num_embeds_ada_norm=10
    ).eval()
    x, steps, classes = latents((size, size)), torch.tensor([1, 401, 801]), torch.tensor([1, 2, 3])
    with torch.no_grad():
        expected = network(x, timestep=steps, class_labels=classes).sample
    torch.testing.assert_close(streamed(network, CalibrationRows(x, steps, classes)), expected, rtol=1e-5, atol=1e-5)


def test_upsampling_that_only_doubles_takes_what_it_can_double():
    torch.manual_seed(0)
    options = {"down_block_types": ("ResnetDownsampleBlock2D",) * 2, "up_block_types": ("ResnetUpsampleBlock2D",) * 2}
    network = UNet2DConditionModel.from_config(dict(networks.conditional().config) | options).eval()
    steps = torch.tensor([1, 401, 801])
    with torch.no_grad():
        expected = network(latents((6, 10)), steps, context()).sample
    found = streamed(network, CalibrationRows(latents((6, 10)), steps, context()))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="latents of 9x9: .* multiples of 2"):
        by_sample(untouched(network), latents((9, 9)), Conditioning(context()), networks.SETTINGS)


@pytest.mark.parametrize("size", [(9, 9), (7, 4)])
def test_sampling_at_odd_sizes_is_that_of_the_stock_loop(size):
    network = deep()
    quantize_(network, W4A8, LEARNED, recorded(network, size), networks.generator())
    found = sample(
        network, networks.scheduler(), latents(size), networks.SETTINGS, conditioning=Conditioning(context())
    )
    scheduler, expected = networks.scheduler(), latents(size)
    scheduler.set_timesteps(5)
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            expected = scheduler.step(network(expected, timestep, context()).sample, timestep, expected).prev_sample
    assert torch.equal(found, expected)


DYNAMIC = (
    Grids(weight_group=8, dynamic_activations=True),
    LowRankBranches(2, 2, 4, data=networks.ALL_ROWS),
    WeightRanges("search"),
    RoundToNearest(),
)


@pytest.mark.parametrize("recipe", [LEARNED, DYNAMIC], ids=["learned", "dynamic"])
@pytest.mark.parametrize("build", [networks.conditional, networks.unconditional])
def test_the_order_of_dimensions_in_memory_changes_nothing(recipe, build):
    network = build()
    pool = recorded(network, (8, 8))
    turned = copy.deepcopy(network).to(memory_format=torch.channels_last)
    for each in (network, turned):
        quantize_(each, W4A8, recipe, pool, networks.generator())
    layers = quantized_layers(turned)
    same = [torch.equal(layer.codes, layers[path].codes) for path, layer in quantized_layers(network).items()]
    assert sum(same) > 0.9 * len(same), "but for the last digits of what learned roundings are learned on"
    assert turned.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    rows = pool.spaced(2, 3)
    x = rows.latents.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = evaluate(turned, rows.latents, rows.timesteps, rows.context)
        found = evaluate(turned, x, rows.timesteps, rows.context)
        after = evaluate(network.to(memory_format=torch.channels_last), x, rows.timesteps, rows.context)
    assert (found - expected).norm() < 0.1 * expected.norm() and (after - expected).norm() < 0.2 * expected.norm()


@pytest.mark.parametrize("kind", [torch.float16, torch.float64])
def test_casting_keeps_the_order_of_dimensions(kind):
    network = networks.unconditional().to(memory_format=torch.channels_last)
    quantize_(network, W4A8, networks.recipe(), recorded(network, (8, 8)), networks.generator())
    network.to(kind)
    assert network.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


# What is refused, before anything is computed


def untouched(network: Network) -> Network:
    network.forward = lambda *_, **__: pytest.fail("the network was evaluated")
    return network


Call = Callable[[Network, Tensor, Conditioning | None, SamplingSettings], object]


def by_sample(network: Network, noise: Tensor, conditioning: Conditioning | None, settings: SamplingSettings) -> object:
    return sample(network, networks.scheduler(), noise, settings, conditioning=conditioning)


def by_pool(network: Network, noise: Tensor, conditioning: Conditioning | None, settings: SamplingSettings) -> object:
    return collect_calibration(network, networks.scheduler(), noise, settings, batch=2, conditioning=conditioning)


GUIDED = SamplingSettings(5, guidance_scale=3.0)
CLASSES = torch.tensor([1, 2, 3])
REFUSED = {
    "fewer prompts": (
        deep,
        latents((8, 8)),
        Conditioning(context(2)),
        networks.SETTINGS,
        "3 images and a conditioning",
    ),
    "more prompts": (deep, latents((8, 8)), Conditioning(context(4)), networks.SETTINGS, "3 images and a conditioning"),
    "fewer of one half": (
        deep,
        latents((8, 8)),
        Conditioning(context(3), context(2)),
        GUIDED,
        "give both halves of one shape",
    ),
    "tokens of one half": (
        deep,
        latents((8, 8)),
        Conditioning(context(3), context(3, 4)),
        GUIDED,
        "give both halves of one shape",
    ),
    "fewer classes": (transformer, latents((8, 8)), Conditioning(CLASSES[:2]), networks.SETTINGS, "3 images and"),
    "other tokens": (
        deep,
        latents((8, 8)),
        Conditioning(context()[..., :7]),
        networks.SETTINGS,
        r"takes \(images, tokens, 12\)",
    ),
    "pooled tokens": (deep, latents((8, 8)), Conditioning(context()[:, 0]), networks.SETTINGS, "tokens, 12"),
    "other channels": (
        deep,
        torch.zeros(3, 4, 8, 8),
        Conditioning(context()),
        networks.SETTINGS,
        r"takes \(images, 3, height, width\)",
    ),
    "one image without its dimension": (
        networks.unconditional,
        torch.zeros(3, 8, 8),
        None,
        networks.SETTINGS,
        "images, 3",
    ),
    "no pixel": (networks.unconditional, torch.zeros(3, 3, 0, 8), None, networks.SETTINGS, "at least one pixel"),
    "odd without interpolation to a size": (
        networks.unconditional,
        latents((9, 9)),
        None,
        networks.SETTINGS,
        "latents of 9x9: .* multiples of 2",
    ),
    "not square": (
        transformer,
        latents((4, 8)),
        Conditioning(CLASSES),
        networks.SETTINGS,
        "latents of 4x8: .* squares of a multiple of 2",
    ),
    "no whole patches": (
        transformer,
        latents((7, 7)),
        Conditioning(CLASSES),
        networks.SETTINGS,
        "latents of 7x7: .* squares of a multiple of 2",
    ),
}


@pytest.mark.parametrize("call", [by_sample, by_pool])
@pytest.mark.parametrize("case", REFUSED)
def test_shapes_that_do_not_fit_are_refused_before_anything_is_computed(case, call: Call):
    build, noise, conditioning, settings, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call(untouched(build()), noise, conditioning, settings)


def test_no_images_are_refused():
    network = untouched(networks.unconditional())
    with pytest.raises(ValueError, match="at least one"):
        by_sample(network, torch.zeros(0, 3, 8, 8), None, networks.SETTINGS)
    with pytest.raises(ValueError, match="holds no image"):
        by_pool(network, torch.zeros(0, 3, 8, 8), None, networks.SETTINGS)


def test_rows_that_do_not_fit_are_refused_before_anything_is_computed():
    pool = recorded(deep(), (9, 9))
    other = CalibrationSet(**{**pool.tensors, "context": pool.context[..., :7]}, settings=pool.settings)
    network = untouched(deep())
    with pytest.raises(ValueError, match=r"takes \(images, tokens, 12\)"):
        quantize_(network, W4A8, LEARNED, other, networks.generator())
    assert not quantized_layers(network)
    plain = recorded(networks.unconditional(), (8, 8))
    odd = CalibrationSet(**{**plain.tensors, "latents": plain.latents[..., :7]}, settings=plain.settings)
    with pytest.raises(ValueError, match="multiples of 2"):
        quantize_(untouched(networks.unconditional()), W4A8, LEARNED, odd, networks.generator())
