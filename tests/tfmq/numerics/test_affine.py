import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tfmq.oracle import each, tensors
from tfmq.numerics.affine import SMALLEST_SCALE, Grid, affine_from_range, dequantize, fake_quantize, quantize
from tfmq.numerics.observer import minmax, search

CASE = "01_fake_quant"
ONE_ULP = 2**-23
GRIDS = {"affine": Grid.unsigned, "sym": Grid.signed}


def oracle_input(match):
    """(x, scale, zero point, grid) that belong to an expected value."""
    values = tensors(CASE)
    setting = f"{match['x']}.b{match['bits']}.{match['grid']}"
    x = values.get(match["x"], values.get(f"{setting}.x"))
    return x, values[f"{setting}.delta"], values[f"{setting}.zero_point"], GRIDS[match["grid"]](int(match["bits"]))


@each(CASE, r"(?P<x>\w+)\.b(?P<bits>\d+)\.(?P<grid>affine|sym)\.tfmq\.out")
@pytest.mark.parametrize("with_gradient", [False, True])
def test_fake_quantize_equals_the_published_forward(match, with_gradient):
    x, scale, zero_point, grid = oracle_input(match)
    expected = tensors(CASE)[match[0]]
    y = fake_quantize(x.clone().requires_grad_(with_gradient), scale, zero_point, grid)
    torch.testing.assert_close(y.detach(), expected, rtol=ONE_ULP, atol=0)
    codes = quantize(x, scale, zero_point, grid)
    assert codes.min() >= grid.qmin and codes.max() <= grid.qmax
    torch.testing.assert_close(dequantize(codes, scale, zero_point), expected, rtol=ONE_ULP, atol=0)


@each(CASE, r"(?P<x>\w+)\.b(?P<bits>\d+)\.(?P<grid>affine|sym)\.tfmq\.grad_x\.closed")
def test_gradients_equal_the_published_ones(match):
    x, scale, zero_point, grid = oracle_input(match)
    values = tensors(CASE)
    x, scale = x.clone().requires_grad_(), scale.clone().requires_grad_()
    (fake_quantize(x, scale, zero_point, grid) * values[f"{match['x']}.upstream"]).sum().backward()
    # The originals multiply and divide the gradient by the step; zeros are exact.
    torch.testing.assert_close(x.grad, values[match[0]], rtol=2 * ONE_ULP, atol=0)
    # The step's gradient is the difference of two float32 sums; their size sets how exact it can be.
    codes = values[match[0].replace("grad_x.closed", "out")] / scale.detach()
    size = (values[f"{match['x']}.upstream"] * codes).abs().sum_to_size(scale.shape)
    expected = values[match[0].replace("grad_x", "grad_delta")]
    assert ((scale.grad - expected).abs() <= 4 * ONE_ULP * size).all()


def test_gradient_goes_only_where_it_is_wanted():
    x = torch.linspace(-2, 2, 9)
    scale, zero_point = torch.tensor(0.3), torch.tensor(3.0)
    learned = scale.clone().requires_grad_()
    fake_quantize(x, learned, zero_point, Grid.unsigned(3)).sum().backward()
    assert learned.grad is not None and x.grad is None
    x.requires_grad_()
    fake_quantize(x, scale, zero_point, Grid.unsigned(3)).sum().backward()
    assert x.grad is not None and scale.grad is None


def away_from_ties(shape, scale, grid, zero_point):
    """Random values, inside and outside the grid, at most 0.4 steps from a grid point."""
    generator = torch.Generator().manual_seed(5)
    span = grid.qmax - grid.qmin
    codes = torch.randint(grid.qmin - span // 2, grid.qmax + span // 2, shape, generator=generator)
    return (codes - zero_point + 0.8 * torch.rand(shape, generator=generator) - 0.4) * scale


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("grid", [Grid.unsigned, Grid.signed])
def test_fake_quantize_equals_torch_per_tensor(bits, grid):
    grid = grid(bits)
    scale, zero_point = torch.tensor(0.0371), torch.tensor(float(grid.qmin + 1))
    x = away_from_ties((7, 11, 3), scale, grid, zero_point)
    expected = torch.fake_quantize_per_tensor_affine(x, scale, zero_point.to(torch.int32), *grid)
    torch.testing.assert_close(fake_quantize(x, scale, zero_point, grid), expected, rtol=2 * ONE_ULP, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("grid", [Grid.unsigned, Grid.signed])
def test_fake_quantize_equals_torch_per_channel(bits, grid):
    grid = grid(bits)
    scale = torch.rand(5, generator=torch.Generator().manual_seed(1)) + 0.01
    zero_point = torch.arange(5).remainder(2**bits).add(grid.qmin).float()
    wide = scale.view(-1, 1, 1), zero_point.view(-1, 1, 1)
    x = away_from_ties((5, 6, 7), wide[0], grid, wide[1])
    expected = torch.fake_quantize_per_channel_affine(x, scale, zero_point.to(torch.int32), 0, *grid)
    torch.testing.assert_close(fake_quantize(x, *wide, grid), expected, rtol=2 * ONE_ULP, atol=0)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("grid", [Grid.unsigned, Grid.signed])
def test_gradients_equal_torch_learnable_fake_quantize(bits, grid):
    grid = grid(bits)
    # torch's backward cuts a negative zero point towards 0, so the signed grid has the usual 0.
    scale, zero_point = torch.tensor([0.0371]), torch.tensor([max(0.0, grid.qmin + 1.0)])
    x = away_from_ties((64, 9), scale, grid, zero_point)
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    grads = []
    for function in (
        lambda x, scale: fake_quantize(x, scale, zero_point, grid),
        lambda x, scale: torch._fake_quantize_learnable_per_tensor_affine(x, scale, zero_point, *grid, 1.0),
    ):
        leaves = x.clone().requires_grad_(), scale.clone().requires_grad_()
        (function(*leaves) * upstream).sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(grads[0][0], grads[1][0], rtol=0, atol=0)
    # torch sums the step's terms as (x_hat - x) / scale, which differs from ours in the last bits.
    torch.testing.assert_close(grads[0][1], grads[1][1], rtol=1e-4, atol=1e-3)


def test_learnable_scale_of_every_row():
    """Row-wise scales get the gradients that each row alone would give."""
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(3))
    scale = torch.tensor([0.1, 0.2, 0.4]).view(3, 1, 1).requires_grad_()
    zero_point = torch.tensor([7.0, 3.0, 9.0]).view(3, 1, 1)
    fake_quantize(x, scale, zero_point, Grid.unsigned(4)).pow(2).sum().backward()
    for i in range(3):
        alone = scale.detach()[i].clone().requires_grad_()
        fake_quantize(x[i], alone, zero_point[i], Grid.unsigned(4)).pow(2).sum().backward()
        torch.testing.assert_close(scale.grad[i], alone.grad)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("ranges", [minmax, search])
@pytest.mark.parametrize("value", [0.0, 5.0, -0.3, 1e-40, -1e-40, 1e4])
def test_constant_rows(value, ranges, bits, symmetric):
    """A constant survives to rounding error: it is a grid end, or so small that the smallest scale turns it to 0."""
    x = torch.full((1, 6), value)
    scale, zero_point = ranges(x, bits, symmetric)
    y = fake_quantize(x, scale[:, None], zero_point[:, None], Grid.signed(bits) if symmetric else Grid.unsigned(bits))
    torch.testing.assert_close(y, x, rtol=1e-6, atol=SMALLEST_SCALE)


@pytest.mark.parametrize("ranges", [minmax, search])
@pytest.mark.parametrize("symmetric", [False, True])
def test_all_zero_row_stays_zero_between_others(ranges, symmetric):
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(4))
    x[1] = 0
    scale, zero_point = ranges(x, 4, symmetric)
    assert torch.isfinite(scale).all() and scale[1] == torch.tensor(SMALLEST_SCALE) and (scale[[0, 2]] > 0.01).all()
    y = fake_quantize(x, scale[:, None], zero_point[:, None], Grid.signed(4) if symmetric else Grid.unsigned(4))
    assert (y[1] == 0).all() and (y[0] != 0).any()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_one_sided_rows(sign, bits):
    """Min-max extends to 0; the search may leave 0 out, and then has the finer grid."""
    x = sign * (3 + torch.rand(2, 300, generator=torch.Generator().manual_seed(6)))
    errors = {}
    for ranges in (minmax, search):
        scale, zero_point = (value[:, None] for value in ranges(x, bits))
        errors[ranges] = (fake_quantize(x, scale, zero_point, Grid.unsigned(bits)) - x).abs().max()
    low, high = (0, x.amax()) if sign > 0 else (x.amin(), 0)
    assert errors[minmax] <= (high - low) / (2**bits - 1) / 2 * 1.00001
    assert errors[search] < errors[minmax]
    scale, zero_point = (value[:, None] for value in minmax(x, bits))
    assert (fake_quantize(torch.zeros(2, 1), scale, zero_point, Grid.unsigned(bits)) == 0).all()


@pytest.mark.parametrize("with_gradient", [False, True])
def test_nan_passes_through_and_infinity_is_clipped(with_gradient):
    x = torch.tensor([0.1, torch.nan, torch.inf, -torch.inf])
    scale = torch.tensor(0.1, requires_grad=with_gradient)
    y = fake_quantize(x, scale, torch.tensor(4.0), Grid.unsigned(4)).detach()
    assert torch.isnan(y).tolist() == [False, True, False, False]
    torch.testing.assert_close(y[2:], torch.tensor([1.1, -0.4]))


def test_inputs_are_left_alone():
    x, scale, zero_point = torch.randn(4, 5), torch.tensor(0.1), torch.tensor(2.0)
    copy = x.clone()
    fake_quantize(x, scale, zero_point, Grid.unsigned(4))
    quantize(x, scale, zero_point, Grid.unsigned(4))
    assert torch.equal(x, copy) and scale == 0.1 and zero_point == 2


def test_codes_of_any_integer_type_dequantize():
    codes = torch.arange(16, dtype=torch.uint8)
    values = dequantize(codes, torch.tensor(0.5), torch.tensor(7.0))
    torch.testing.assert_close(values, (torch.arange(16) - 7.0) * 0.5)


# -- properties -------------------------------------------------------------------------------------------------------

finite = st.floats(-1e4, 1e4, width=32)
rows = st.lists(finite, min_size=1, max_size=20).map(lambda values: torch.tensor([values]))
# Fixed examples and no time limit: the same run everywhere.
steady = settings(derandomize=True, deadline=None, max_examples=200, database=None)


def minmax_grid(x, bits, symmetric):
    scale, zero_point = minmax(x, bits, symmetric)
    return scale[:, None], zero_point[:, None], Grid.signed(bits) if symmetric else Grid.unsigned(bits)


@steady
@given(rows, st.integers(2, 8), st.booleans())
def test_error_inside_the_range_is_at_most_half_a_step(x, bits, symmetric):
    scale, zero_point, grid = minmax_grid(x, bits, symmetric)
    error = (fake_quantize(x, scale, zero_point, grid).double() - x.double()).abs()
    # Beside the half step: a few float32 roundings of x / scale and of the product.
    assert (error <= scale.double() / 2 + 2**-21 * x.double().abs().max()).all()


@steady
@given(rows, finite, st.integers(2, 8), st.booleans())
def test_fake_quantizing_twice_changes_nothing(x, other, bits, symmetric):
    """Also for values outside the range the grid was made for."""
    setting = minmax_grid(x, bits, symmetric)
    once = fake_quantize(torch.cat([x, torch.tensor([[other]])], 1), *setting)
    assert torch.equal(fake_quantize(once, *setting), once)


@steady
@given(rows, st.integers(2, 8), st.booleans())
def test_zero_is_exact_after_minmax(x, bits, symmetric):
    scale, zero_point, grid = minmax_grid(x, bits, symmetric)
    assert grid.qmin <= zero_point.item() <= grid.qmax
    assert fake_quantize(torch.zeros(1, 1), scale, zero_point, grid).item() == 0


@steady
@given(rows, st.integers(2, 8), st.booleans())
def test_outputs_keep_the_order_of_inputs(x, bits, symmetric):
    x = x.sort().values
    assert (fake_quantize(x, *minmax_grid(x, bits, symmetric)).diff() >= 0).all()


@steady
@given(finite, finite, st.integers(2, 8))
def test_affine_range_spans_low_to_high(first, second, bits):
    low, high = torch.tensor([min(first, second)]), torch.tensor([max(first, second)])
    scale, zero_point = affine_from_range(low, high, bits)
    assert scale.item() >= torch.tensor(SMALLEST_SCALE).item()
    assert zero_point.item() == round(zero_point.item())
    symmetric_scale, symmetric_point = affine_from_range(low, high, bits, symmetric=True)
    assert symmetric_point.item() == 0
    widest = max(abs(first), abs(second))
    assert symmetric_scale.item() * (2 ** (bits - 1) - 1) >= widest * (1 - 1e-6)
