"""NaN and infinity are found wherever they are, in every type and layout."""

import pytest
import torch

from tfmq.numerics.finite import all_finite, extremes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("size", [1, 7, 33, 1003])
def test_one_element_is_enough(dtype, bad, size):
    x = torch.randn(size, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    for given in (x, x.T, x[:, 1]):
        assert all_finite(given)
    for place in {0, size // 2, size - 1}:
        broken = x.clone()
        broken[place, 1] = bad
        assert not any(map(all_finite, (broken, broken.T, broken[:, 1])))
        assert all_finite(broken[:, 0])


def test_codes_and_nothing_are_finite():
    assert all_finite(torch.tensor([3, 255], dtype=torch.uint8)) and all_finite(torch.empty(0, 4))


def test_the_extremes_of_any_layout_are_those_of_its_elements():
    x = torch.randn(4, 6, 5, 5, generator=torch.Generator().manual_seed(1))
    for given in (x, x.contiguous(memory_format=torch.channels_last), x.transpose(1, 3), x[:, ::2]):
        assert [end.item() for end in extremes(given)] == [given.flatten().min().item(), given.flatten().max().item()]
