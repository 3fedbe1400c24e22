"""What lies between layers in integers: the parts that work in place are those of diffusers and torch."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.nn import functional as F

from tests.tfmq.modules.test_integer import layer_of, random
from tfmq.modules.in_cache import CodesUpsample, InPlaceResnetBlock, PixelsGroupNorm
from tfmq.modules.integer import IntegerLayer
from tfmq.modules.integer_products import InputGrid, cpu_is_exact

pytestmark = pytest.mark.skipif(not cpu_is_exact(), reason="the 8-bit kernels of this processor are not exact")


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def norm_of(groups: int, channels: int) -> nn.GroupNorm:
    torch.manual_seed(0)
    norm = nn.GroupNorm(groups, channels, eps=1e-5).requires_grad_(False)
    norm.weight.normal_(1, 0.3)
    norm.bias.normal_(0, 0.3)
    return norm


@pytest.mark.parametrize(
    "shape", [(1, 32, 4, 4), (5, 64, 8, 8), (3, 96, 9, 7), (2, 48, 40, 48), (2, 48, 20, 12)], ids=str
)
def test_a_norm_is_that_in_float64(shape):
    norm = norm_of(16, shape[1])
    # Means of several deviations, at which squares less the square of the mean would be off.
    x = channels_last(random(*shape) + 20 * random(1, shape[1], 1, 1, seed=1))
    expected = F.group_norm(x.double(), 16, norm.weight.double(), norm.bias.double(), norm.eps)
    found = PixelsGroupNorm(norm)(x)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert (found - expected).abs().max() < 2e-5
    assert torch.equal(PixelsGroupNorm(norm)(x.contiguous()), norm(x.contiguous())), "torch's, in other memory"


@pytest.mark.parametrize("point", [119, -30])
def test_codes_of_its_silu_are_those_of_the_parts_one_after_the_other(point):
    norm, grid = PixelsGroupNorm(norm_of(16, 64)), InputGrid(4 / 255, point, 255)
    x = channels_last(random(9, 64, 24, 24))
    assert norm.takes(x)
    assert torch.equal(norm.codes_of_silu(x.clone(), grid), grid.codes(F.silu(norm(x))))


def test_norms_depend_on_neither_batch_nor_threads():
    norm, grid = PixelsGroupNorm(norm_of(32, 96)), InputGrid(4 / 255, 119, 255)
    x = channels_last(random(64, 96, 8, 8))
    whole = norm.codes_of_silu(x, grid)
    for rows in (1, 3, 16):
        assert torch.equal(torch.cat([norm.codes_of_silu(part, grid) for part in x.split(rows)]), whole)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(norm.codes_of_silu(x, grid), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("skip_time_act", [False, True])
@pytest.mark.parametrize(("channels", "scale"), [(32, 1.0), (48, 2.0)])
def test_a_residual_block_is_that_of_diffusers(channels, scale, skip_time_act):
    torch.manual_seed(0)
    block = ResnetBlock2D(
        in_channels=32,
        out_channels=channels,
        temb_channels=16,
        groups=16,
        output_scale_factor=scale,
        skip_time_act=skip_time_act,
    )
    block.eval().requires_grad_(False)
    for name in ("conv1", "conv2", "norm1", "norm2"):
        part = getattr(block, name)
        setattr(block, name, PixelsGroupNorm(part) if "norm" in name else IntegerLayer(*layer_of(part)))
    x, temb = channels_last(random(3, 32, 8, 8)), random(3, 16, seed=1)
    given = x.clone(memory_format=torch.preserve_format), temb.clone()
    expected = block(*given)
    assert InPlaceResnetBlock.suits(block) and not InPlaceResnetBlock.suits(block.conv1)
    found = InPlaceResnetBlock(block)(*given)
    assert torch.equal(found, expected)
    assert torch.equal(given[0], x) and torch.equal(given[1], temb), "inputs stay as they are"


def test_blocks_that_do_more_stay_those_of_diffusers():
    for changes in ({"up": True}, {"down": True}, {"time_embedding_norm": "scale_shift"}, {"non_linearity": "mish"}):
        block = ResnetBlock2D(in_channels=32, temb_channels=16, groups=16, **changes).eval().requires_grad_(False)
        for name in ("conv1", "conv2"):
            setattr(block, name, IntegerLayer(*layer_of(getattr(block, name))))
        for name in ("norm1", "norm2"):
            setattr(block, name, PixelsGroupNorm(getattr(block, name)))
        assert not InPlaceResnetBlock.suits(block), changes


def test_codes_are_repeated_as_pixels_are():
    upsample = Upsample2D(24, use_conv=True).eval().requires_grad_(False)
    upsample.conv = IntegerLayer(*layer_of(upsample.conv))
    assert CodesUpsample.suits(upsample)
    twin = CodesUpsample(upsample)
    for x in (random(3, 24, 5, 7), channels_last(random(3, 24, 5, 7))):
        assert torch.equal(twin(x), upsample(x))
    assert torch.equal(twin(x, output_size=(9, 13)), upsample(x, output_size=(9, 13)))
