"""Float parts of executed networks that are computed a part at a time, against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tfmq.modules.in_cache import ChannelsLastGroupNorm


@pytest.mark.parametrize("shape", [(3, 32, 8, 8), (70, 64, 8, 8), (2, 96, 4, 4), (2, 160, 8, 8), (2, 32, 16, 4)])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_a_group_norm_is_that_of_torch_in_any_layout(shape, layout):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator) * 3 + 1).contiguous(memory_format=layout)
    norm = nn.GroupNorm(8, shape[1], eps=1e-5)
    nn.init.normal_(norm.weight, generator=generator)
    nn.init.normal_(norm.bias, generator=generator)
    twin = ChannelsLastGroupNorm.of(norm)
    expected = F.group_norm(x.double(), 8, norm.weight.double(), norm.bias.double(), 1e-5)
    found = twin(x)
    assert (found - expected).abs().max() < 5e-6 * expected.abs().max()
    assert found.stride() == x.stride()
    assert torch.equal(torch.cat([twin(part) for part in x.split(1)]), found)
    assert twin.state_dict().keys() == norm.state_dict().keys()
