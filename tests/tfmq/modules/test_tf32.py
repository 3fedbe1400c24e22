"""What tensor cores make of codes: TF32 keeps ten bits behind the leading one, which is emulated here."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.sources.originals.architectures import ARCHITECTURES
from benchmarks.stages.plan import build
from tests.tfmq.modules.test_integer import layer_of, random
from tfmq.modules.integer import IntegerLayer
from tfmq.modules.integer_products import EXACT, TF32_EXACT, cpu_is_exact, exact_parts, int_mm, part_sizes


def tf32(x: torch.Tensor) -> torch.Tensor:
    """``x`` as tensor cores read it: float32 rounded, half to even, to ten bits of mantissa."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def test_integers_up_to_2048_are_exact():
    numbers = torch.arange(-TF32_EXACT, TF32_EXACT + 1).float()
    assert torch.equal(tf32(numbers), numbers)
    assert tf32(torch.tensor([2049.0])).item() == 2048.0
    assert tf32(torch.tensor([1 + 2**-10, 1 + 2**-11])).tolist() == [1 + 2**-10, 1.0]


@pytest.mark.skipif(not cpu_is_exact(), reason="the 8-bit kernels of this processor are not exact")
@pytest.mark.parametrize("bits", [8, 4])
def test_centred_codes_pass_unchanged_and_values_would_not(bits):
    torch.manual_seed(0)
    for module, x in ((nn.Conv2d(24, 20, 3, padding=1), random(3, 24, 8, 8)), (nn.Linear(24, 20), random(9, 24))):
        layer, tracker = layer_of(module, bits)
        executed = IntegerLayer(layer, tracker)
        grid, weight = executed.grid, executed.weights[0].centred().float()
        centred = grid.codes(x).float() - grid.zero_point
        for codes, values in ((centred, centred * grid.scale), (weight, layer.weight)):
            assert torch.equal(tf32(codes), codes)
            assert (tf32(values) != values).float().mean() > 0.5


def longest() -> dict[str, int]:
    """The most products that an output of a layer sums, by published network."""
    found = {}
    for name, architecture in ARCHITECTURES.items():
        network = build(architecture.full.unet, torch.device("meta"))
        layers = [each for each in network.modules() if isinstance(each, nn.Conv2d | nn.Linear)]
        found[name] = max(each.weight[0].numel() for each in layers)
    return found


def test_the_longest_sums_of_the_papers_networks_are_taken_in_parts_that_are_exact():
    terms = longest()
    assert max(terms.values()) == terms["sd-v1"] == 9 * 2560
    channels, largest = max(terms.values()) // 9, 255
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (2, channels, 4, 4), generator=generator).float() - 20
    weight = torch.randn(8, channels, 3, 3, generator=generator)
    weight = (weight / weight.abs().flatten(1).amax(1).view(-1, 1, 1, 1) * 127).round()
    sizes = part_sizes(weight.abs().long().flatten(2).sum(2), largest)
    assert len(sizes) > 1 and sum(sizes) == channels
    for piece, part in zip(codes.split(sizes, 1), weight.split(sizes, 1), strict=True):
        assert (part.abs().flatten(1).sum(1) * largest).max() <= EXACT
        assert torch.equal(F.conv2d(tf32(piece), tf32(part)).double(), F.conv2d(piece.double(), part.double()))
    assert F.conv2d(codes.abs().double(), weight.abs().double()).max() > EXACT, "all at once would not be"


def test_the_longest_sums_fit_into_the_integers_of_8_bit_products():
    terms = max(longest().values())
    codes, weight = torch.full((17, terms), 255, dtype=torch.uint8), torch.full((8, terms), -128, dtype=torch.int8)
    assert int_mm(codes, 0, weight).unique().tolist() == [-255 * 128 * terms]
    assert terms * 255 * 255 < 2**31
    floats = exact_parts(codes.float(), weight.float(), None, part_sizes(weight.abs().long(), 255), 255)
    assert floats.unique().tolist() == [-255 * 128 * terms], "a multiple of 128, which float32 holds"
