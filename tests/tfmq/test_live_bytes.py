"""Live bytes are those that a count by hand gives, on the meta device and where there is memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from tfmq.live_bytes import FusedAttention, LiveBytes

SQUARE = 4 * 10 * 10


@pytest.fixture(params=["meta", "cpu"])
def device(request):
    return torch.device(request.param)


def test_tensors_count_from_when_they_are_made_to_when_nothing_holds_them(device):
    given = torch.zeros(10, 10, device=device)
    with LiveBytes() as live:
        first = given + 1
        second = first.T.relu()
        assert (live.now, live.most) == (2 * SQUARE, 2 * SQUARE)
        del first
        assert (live.now, live.most) == (SQUARE, 2 * SQUARE)
        third = second + 1
    assert live.now == live.most == 2 * SQUARE
    del second, third
    assert live.now == 0


def test_views_and_changes_in_place_take_nothing(device):
    given = torch.zeros(10, 10, device=device)
    with LiveBytes() as live:
        given.view(100).add_(1)
        given.T.relu_().mul_(2)
    assert live.most == 0


def test_a_backward_pass_takes_what_it_saves_and_the_gradients(device):
    layer = nn.Linear(10, 10, bias=False, device=device)
    x = torch.zeros(10, 10, device=device)
    with LiveBytes() as live:
        layer(x).exp().sum().backward()
    # The exponential goes when the gradient of its input is there, from which that of the weight is made.
    assert 2 * SQUARE <= live.most <= 2 * SQUARE + 8
    assert live.now == SQUARE


def test_a_convolution_copies_its_arguments_and_results():
    x, weight = torch.zeros(2, 3, 8, 8, device="meta"), torch.zeros(5, 3, 3, 3, device="meta")
    with LiveBytes() as live:
        y = functional.conv2d(x, weight, padding=1)
    assert live.now == y.nbytes == 4 * 2 * 5 * 64
    assert live.most == y.nbytes + (x.nbytes + weight.nbytes + y.nbytes)


def test_attention_in_floating_point_takes_no_matrix_of_probabilities():
    x = torch.zeros(1, 2, 1000, 8, device="meta")
    with FusedAttention(), LiveBytes() as live:
        functional.scaled_dot_product_attention(x, x, x)
    assert live.most < 1000**2
