"""Rounding by second moments, against GPTQ as it was published, least squares, and brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tfmq.numerics.affine import Grid, dequantize, quantize
from tfmq.numerics.second_order import (
    SecondMoments,
    best_codes,
    best_scales,
    damped,
    least_squares,
    nearest_plane,
    patch_moments,
    rounding_cost,
    weighted_range,
)

GRID = Grid.unsigned(4)


def example(inputs: int = 200, outputs: int = 6, samples: int = 600):
    """Correlated inputs, a weight, H, and the weight's grid."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(inputs, inputs, generator=generator) / inputs**0.5
    x = torch.randn(samples, inputs, generator=generator) @ mixed + 0.3
    weight = torch.randn(outputs, inputs, generator=generator)
    scale = (weight.abs().amax(1, keepdim=True) / 7.5).expand_as(weight)
    return x, weight, x.T @ x, scale, torch.full_like(weight, 8.0)


def moments_of(x, lacking):
    """Second moments, added in parts."""
    moments = SecondMoments.of(torch.empty(lacking.shape[1], x.shape[1]))
    for parts in zip(x.split(250), lacking.split(250), strict=True):
        moments.add(*parts)
    return moments


def cost(weight, codes, scale, zero_point, squares) -> float:
    return rounding_cost(weight, dequantize(codes, scale, zero_point), squares).sum().item()


def published_gptq(weight, scale, zero_point, squares, damping):
    """Algorithm 1 of arXiv 2210.17323 with columns by falling diagonal: by the Cholesky factor of the inverse."""
    order = torch.argsort(squares.diagonal(), descending=True, stable=True)
    inverse = torch.linalg.inv(damped(squares, damping)[order][:, order].double())
    factor = torch.linalg.cholesky(inverse, upper=True)
    left, codes = weight[:, order].double(), torch.zeros_like(weight)
    scale, zero_point = scale[:, order], zero_point[:, order]
    for i in range(left.shape[1]):
        codes[:, i] = quantize(left[:, i].float(), scale[:, i], zero_point[:, i], GRID)
        error = (left[:, i] - (codes[:, i] - zero_point[:, i]) * scale[:, i]) / factor[i, i]
        left[:, i:] -= error[:, None] * factor[i, i:]
    return codes[:, torch.argsort(order)]


def every_choice(inputs: int):
    return (torch.tensor([codes], dtype=torch.float32) for codes in itertools.product(range(16), repeat=inputs))


def test_it_is_gptq_without_an_inverse():
    _, weight, squares, scale, zero_point = example()
    found = nearest_plane(weight, scale, zero_point, GRID, damped(squares, 0.01))
    expected = published_gptq(weight, scale, zero_point, squares, 0.01)
    assert (found != expected).float().mean() < 0.01, "but for ties"
    costs = [cost(weight, codes, scale, zero_point, squares) for codes in (found, expected)]
    np.testing.assert_allclose(*costs, rtol=0.02)
    nearest = quantize(weight, scale, zero_point, GRID)
    assert costs[0] < 0.7 * cost(weight, nearest, scale, zero_point, squares)


def test_of_two_inputs_it_finds_nearly_the_best_codes():
    _, weight, squares, scale, zero_point = example(inputs=2, outputs=8)
    found = nearest_plane(weight, scale, zero_point, GRID, damped(squares, 0.0))
    better = best_codes(weight, found, scale, zero_point, GRID, squares)
    for row in range(len(weight)):
        one = slice(row, row + 1)

        def of(codes, one=one):
            return cost(weight[one], codes, scale[one], zero_point[one], squares)

        least, rounded = min(map(of, every_choice(2))), quantize(weight[one], scale[one], zero_point[one], GRID)
        assert least <= of(better[one]) * (1 + 1e-5)
        assert of(better[one]) <= of(found[one]) * (1 + 1e-5) <= of(rounded) * (1 + 1e-4)


def test_uncorrelated_inputs_round_to_nearest():
    _, weight, _, scale, zero_point = example(inputs=30)
    squares, scale = torch.diag(torch.arange(1.0, 31.0)), 1.01 * scale  # no ties
    nearest = quantize(weight, scale, zero_point, GRID)
    assert torch.equal(nearest_plane(weight, scale, zero_point, GRID, damped(squares, 0.01)), nearest)
    assert torch.equal(best_codes(weight, nearest, scale, zero_point, GRID, squares), nearest)


def test_no_other_code_is_better_once_each_is_the_best():
    _, weight, squares, scale, zero_point = example(inputs=150)
    codes = nearest_plane(weight, scale, zero_point, GRID, damped(squares, 0.01))
    start = cost(weight, codes, scale, zero_point, squares)
    for _ in range(40):
        codes = best_codes(weight, codes, scale, zero_point, GRID, squares)
    end = cost(weight, codes, scale, zero_point, squares)
    assert end < 0.98 * start
    for column, change in itertools.product(range(0, 150, 7), (-1, 1)):
        other = codes.clone()
        other[:, column] = (other[:, column] + change).clamp(GRID.qmin, GRID.qmax)
        costs = rounding_cost(weight, dequantize(other, scale, zero_point), squares)
        assert (costs >= (1 - 1e-5) * rounding_cost(weight, dequantize(codes, scale, zero_point), squares)).all()


@pytest.mark.parametrize("splits", [(60,), (20, 40)])
def test_the_best_scale_is_at_the_bottom(splits):
    _, weight, squares, scale, zero_point = example(inputs=60)
    centred = quantize(weight, scale, zero_point, GRID) - zero_point
    found = scale[:, : len(splits)]
    for _ in range(30):
        found = best_scales(weight, centred, found, splits, squares)

    def costs(scales):
        return rounding_cost(weight, centred * scales.repeat_interleave(torch.tensor(splits), 1), squares)

    for group, change in itertools.product(range(len(splits)), (0.99, 1.01)):
        other = found.clone()
        other[:, group] *= change
        assert (costs(other) > costs(found)).all()
    assert torch.equal(best_scales(weight, 0 * centred, found, splits, squares), found), "no code says anything"


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_weighted_range_is_the_best_of_those_tried(symmetric):
    _, weight, squares, _, _ = example(inputs=40)
    weight[:, 0] *= 8
    importance = squares.diagonal().clone()
    importance[0] = 0

    def error(scale, point):
        rounded = dequantize(quantize(weight, scale[:, None], point[:, None], GRID), scale[:, None], point[:, None])
        return ((rounded - weight) ** 2 * importance).sum(1)

    scale, point = weighted_range(weight, importance, 4, symmetric)
    assert torch.equal(point, point.round()) and (not symmetric or (point == 8).all())
    widest = weight[:, 0].abs() / (7 if symmetric else 15)
    assert (scale < widest).any(), "an outlier that no input sees does not widen the range"
    assert (error(scale, point) <= error(*weighted_range(weight, torch.ones(40), 4, symmetric)) * (1 + 1e-6)).all()


def test_the_best_weight_is_that_of_least_squares():
    x, weight, _, _, _ = example(inputs=40)
    generator = torch.Generator().manual_seed(1)
    noisy = x + 0.2 * torch.randn(x.shape, generator=generator)
    moments = moments_of(noisy, (x - noisy) @ weight.T)
    expected, *_ = np.linalg.lstsq(noisy.double().numpy(), (x @ weight.T).double().numpy(), rcond=None)
    found = least_squares(weight, moments.squares, moments.products)
    np.testing.assert_allclose(found.numpy(), expected.T, atol=2e-3)
    assert torch.equal(least_squares(weight, moments.squares, 0 * moments.products), weight)


def test_centred_moments_are_those_of_deviations_from_the_mean():
    x, weight, _, _, _ = example(inputs=20)
    lacking = x @ weight.T
    squares, products = moments_of(x, lacking).centred()
    deviations = x - x.mean(0)
    torch.testing.assert_close(squares, deviations.T @ deviations, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(products, (lacking - lacking.mean(0)).T @ deviations, rtol=1e-3, atol=1e-2)


def test_an_input_that_is_always_0_keeps_its_weight():
    squares = torch.diag(torch.tensor([4.0, 0.0]))
    weight = torch.tensor([[1.0, 2.0]])
    found = least_squares(weight, damped(squares, 0.0), torch.tensor([[4.0, 0.0]]))
    assert torch.equal(found, torch.tensor([[2.0, 2.0]]))


@pytest.mark.parametrize(
    ("size", "kernel", "padding"),
    [
        ((8, 8), (3, 3), (1, 1)),
        ((2, 2), (3, 3), (1, 1)),
        ((1, 1), (3, 3), (1, 1)),
        ((7, 6), (3, 3), (0, 0)),
        ((6, 7), (1, 3), (0, 1)),
        ((9, 8), (5, 5), (2, 1)),
        ((8, 9), (2, 2), (0, 0)),
    ],
)
def test_moments_of_patches_are_those_of_all_patches(size, kernel, padding):
    x = torch.randn(4, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    patches = F.unfold(x, kernel, padding=padding).transpose(1, 2).flatten(0, 1)
    count, inputs, squares = patch_moments(x, kernel, padding)
    assert count == len(patches)
    torch.testing.assert_close(inputs, patches.sum(0))
    torch.testing.assert_close(squares, patches.T @ patches)


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (1, 1, 0), (1, 2, 0), (3, 2, 0)])
def test_moments_of_a_convolution_are_those_of_the_linear_layer_that_it_is(kernel, stride, padding):
    torch.manual_seed(0)
    layer, other = (nn.Conv2d(3, 5, kernel, stride, padding) for _ in range(2))
    x = torch.randn(4, 3, 9, 8)
    with torch.no_grad():
        lacking = other(x) - layer(x)
    moments = SecondMoments.of(layer.weight.detach())
    moments.add_convolution(x, lacking, layer.kernel_size, layer.stride, (padding, padding))
    patches = F.unfold(x, kernel, padding=padding, stride=stride).transpose(1, 2).flatten(0, 1)
    expected = moments_of(patches, lacking.permute(0, 2, 3, 1).flatten(0, 2))
    for name, value in vars(expected).items():
        torch.testing.assert_close(getattr(moments, name), value, rtol=1e-4, atol=1e-4)
    found = least_squares(layer.weight.detach().flatten(1), *moments.centred())
    torch.testing.assert_close(found, other.weight.detach().flatten(1), rtol=1e-3, atol=1e-3)
