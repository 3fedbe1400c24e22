"""Rounding by second moments, against GPTQ as it was published, least squares, and brute force."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from tfmq.numerics.affine import Grid, quantize
from tfmq.numerics.second_order import SecondMoments, damped, least_squares, nearest_plane

GRID = Grid.unsigned(4)


def example(inputs: int = 200, outputs: int = 6, samples: int = 600):
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(inputs, inputs, generator=generator) / inputs**0.5
    x = torch.randn(samples, inputs, generator=generator) @ mixed + 0.3
    weight = torch.randn(outputs, inputs, generator=generator)
    moments = SecondMoments.empty(inputs, outputs, torch.device("cpu"))
    for part in x.split(250):
        moments.add(part, part @ weight.T)
    scale = (weight.abs().amax(1, keepdim=True) / 7.5).expand_as(weight)
    return x, weight, moments, scale, torch.full_like(weight, 8.0)


def cost(weight, codes, scale, zero_point, squares) -> float:
    error = weight - (codes - zero_point) * scale
    return (error @ squares * error).sum().item()


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


def test_it_is_gptq_without_an_inverse():
    _, weight, moments, scale, zero_point = example()
    found = nearest_plane(weight, scale, zero_point, GRID, moments.squares, 0.01)
    expected = published_gptq(weight, scale, zero_point, moments.squares, 0.01)
    assert (found != expected).float().mean() < 0.01, "but for ties"
    costs = [cost(weight, codes, scale, zero_point, moments.squares) for codes in (found, expected)]
    np.testing.assert_allclose(*costs, rtol=0.02)
    nearest = quantize(weight, scale, zero_point, GRID)
    assert costs[0] < 0.7 * cost(weight, nearest, scale, zero_point, moments.squares)


def test_of_two_inputs_it_finds_nearly_the_best_codes():
    _, weight, moments, scale, zero_point = example(inputs=2, outputs=8)
    found = nearest_plane(weight, scale, zero_point, GRID, moments.squares, 0.0)
    for row in range(len(weight)):
        one = slice(row, row + 1)
        every = (torch.tensor([pair], dtype=torch.float32) for pair in itertools.product(range(16), repeat=2))
        costs = [cost(weight[one], codes, scale[one], zero_point[one], moments.squares) for codes in every]
        own = cost(weight[one], found[one], scale[one], zero_point[one], moments.squares)
        rounded = quantize(weight[one], scale[one], zero_point[one], GRID)
        assert (
            min(costs) <= own <= cost(weight[one], rounded, scale[one], zero_point[one], moments.squares) * (1 + 1e-5)
        )


def test_uncorrelated_inputs_round_to_nearest():
    _, weight, _, scale, zero_point = example(inputs=30)
    found = nearest_plane(weight, scale, zero_point, GRID, torch.diag(torch.arange(1.0, 31.0)), 0.01)
    assert torch.equal(found, quantize(weight, scale, zero_point, GRID))


def test_the_best_weight_is_that_of_least_squares():
    x, weight, _, _, _ = example(inputs=40)
    generator = torch.Generator().manual_seed(1)
    noisy = x + 0.2 * torch.randn(x.shape, generator=generator)
    moments = SecondMoments.empty(40, len(weight), x.device)
    moments.add(noisy, x @ weight.T)
    expected, *_ = np.linalg.lstsq(noisy.double().numpy(), (x @ weight.T).double().numpy(), rcond=None)
    found = least_squares(weight, moments.squares, moments.products, 0.0)
    np.testing.assert_allclose(found.numpy(), expected.T, atol=2e-3)
    assert torch.equal(least_squares(weight, moments.squares, weight @ moments.squares, 0.01), weight)


def test_centred_moments_are_those_of_deviations_from_the_mean():
    x, weight, moments, _, _ = example(inputs=20)
    squares, products = moments.centred()
    deviations, outputs = x - x.mean(0), x @ weight.T
    torch.testing.assert_close(squares, deviations.T @ deviations, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(products, (outputs - outputs.mean(0)).T @ deviations, rtol=1e-3, atol=1e-2)


def test_an_input_that_is_always_0_keeps_its_weight():
    squares = torch.diag(torch.tensor([4.0, 0.0]))
    weight = torch.tensor([[1.0, 2.0]])
    found = least_squares(weight, squares, torch.tensor([[8.0, 0.0]]), 0.0)
    assert torch.equal(found, torch.tensor([[2.0, 2.0]]))
