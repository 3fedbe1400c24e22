import pytest
import torch

from tests.tfmq.oracle import each, read, said, tensors
from tfmq.numerics import observer
from tfmq.numerics.affine import SMALLEST_SCALE, Grid, fake_quantize
from tfmq.numerics.observer import (
    SEARCH_NORM,
    RangeObserver,
    SearchObserver,
    ThresholdObserver,
    minmax,
    search,
    thresholds,
)

SEARCH_CASE = "02_range_search"
RUNNING_CASE = "04_running_range"
SOFTMAX_CASE = "05_softmax_zero_point_zero"
# How the originals' running ends are written in the formulas of their tensors.
RUNNING_END = r"end = #\*end \+ #\*batch end"
THRESHOLD_END = r"#\*(?:new|searched) \+ #\*running"
SOFTMAX_END = r"upper end = #\*#\*max \+ #\*max"
GRIDS = {"affine": Grid.unsigned, "sym": Grid.signed}


def rows_of(x, granularity):
    return x.flatten(1) if granularity == "channel" else x.reshape(1, -1)


def criterion(rows, scale, zero_point, grid):
    return (fake_quantize(rows, scale[:, None], zero_point[:, None], grid) - rows).abs().pow(SEARCH_NORM).mean(1)


# -- min-max and search -----------------------------------------------------------------------------------------------


@each(
    SEARCH_CASE,
    r"(?P<x>\w+)\.b(?P<bits>\d+)\.(?P<grid>affine|sym)\.(?P<granularity>channel|tensor)\.tfmq\.minmax\.delta",
)
def test_minmax_equals_the_published_range(match):
    values = tensors(SEARCH_CASE)
    x = values.get(match["x"], values.get(f"{match['x']}.x"))
    rows, bits, symmetric = rows_of(x, match["granularity"]), int(match["bits"]), match["grid"] == "sym"
    scale, zero_point = minmax(rows, bits, symmetric)
    torch.testing.assert_close(scale, values[match[0]].reshape(-1), rtol=1e-6, atol=0)
    prefix = match[0].removesuffix(".delta")
    if f"{prefix}.zero_point" not in values:  # the row of zeros has a recorded scale only
        return
    assert torch.equal(zero_point, values[f"{prefix}.zero_point"].reshape(-1))
    y = fake_quantize(rows, scale[:, None], zero_point[:, None], GRIDS[match["grid"]](bits))
    assert_same_codes(y, values[f"{prefix}.dequant"].reshape(rows.shape), scale[:, None])


@each(
    SEARCH_CASE,
    r"(?P<x>\w+)\.b(?P<bits>\d+)\.(?P<grid>affine|sym)\.(?P<granularity>channel|tensor)\.(?P<by>tfmq|qdiff)\.mse\.delta",
)
def test_search_equals_the_published_range(match):
    values = tensors(SEARCH_CASE)
    prefix = match[0].removesuffix(".delta")
    rows, bits = rows_of(values[match["x"]], match["granularity"]), int(match["bits"])
    symmetric, grid = match["grid"] == "sym", GRIDS[match["grid"]](int(match["bits"]))
    scale, zero_point = search(rows, bits, symmetric)
    # Where the two best candidates are this close, either may win; then only the criterion has to agree.
    clear = values[f"{prefix}.gap"].reshape(-1) >= 1e-5
    expected = values[match[0]].reshape(-1)
    torch.testing.assert_close(scale[clear], expected[clear], rtol=1e-6, atol=0)
    assert torch.equal(zero_point[clear], values[f"{prefix}.zero_point"].reshape(-1)[clear])
    # Scales shrink by 1 % of the widest from one candidate to the next.
    low, high = rows.amin(1), rows.amax(1)
    widest, _ = observer.affine_from_range(low, high, bits, symmetric)
    index = torch.round(100 * (1 - scale / widest))
    assert torch.equal(index[clear], values[f"{prefix}.best_index"][clear].float())
    score = criterion(rows, scale, zero_point, grid)
    recorded = fake_quantize(rows, expected[:, None], values[f"{prefix}.zero_point"].reshape(-1, 1), grid)
    best = values.get(f"{prefix}.best_score", (recorded - rows).abs().pow(SEARCH_NORM).mean(1))
    torch.testing.assert_close(score, best, rtol=1e-4, atol=0)
    y = fake_quantize(rows, scale[:, None], zero_point[:, None], grid)[clear]
    assert_same_codes(y, values[f"{prefix}.dequant"].reshape(rows.shape)[clear], scale[clear, None])


def assert_same_codes(y, expected, scale):
    """Equal codes; the values differ by the float32 error of the scale."""
    assert ((y - expected).abs() <= 1e-4 * scale).all()


@pytest.mark.parametrize("symmetric", [False, True])
def test_search_does_not_depend_on_the_chunks(symmetric, monkeypatch):
    rows = torch.randn(6, 50, generator=torch.Generator().manual_seed(1))
    whole = search(rows, 3, symmetric)
    for chunk in (1, 7):
        monkeypatch.setattr(observer, "_chunk", lambda rows, most, chunk=chunk: chunk)
        assert all(torch.equal(a, b) for a, b in zip(search(rows, 3, symmetric), whole, strict=True))


def test_search_treats_rows_independently():
    rows = torch.randn(5, 64, generator=torch.Generator().manual_seed(2)) * torch.tensor([[1e-3], [1], [10], [0], [1]])
    together = search(rows, 4)
    alone = [search(row[None], 4) for row in rows]
    assert torch.equal(together[0], torch.cat([scale for scale, _ in alone]))
    assert torch.equal(together[1], torch.cat([point for _, point in alone]))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_search_is_the_best_of_its_candidates(bits, symmetric):
    """Against a plain loop over all 80; in the last row the two outliers make the narrowest one win at 2 bits."""
    rows = torch.randn(4, 4000, generator=torch.Generator().manual_seed(3)) ** 3
    rows[3] = torch.linspace(-1, 1, 4000)
    rows[3, [0, -1]] = torch.tensor([-5.0, 5.0])
    grid = Grid.signed(bits) if symmetric else Grid.unsigned(bits)
    found = criterion(rows, *search(rows, bits, symmetric), grid)
    low, high = rows.amin(1), rows.amax(1)
    for i in range(80):
        shrink = 1 - 0.01 * i
        candidate = observer.affine_from_range(low * shrink, high * shrink, bits, symmetric)
        scores = criterion(rows, *candidate, grid)
        assert (found <= scores * (1 + 1e-5)).all()
    if bits == 2:
        torch.testing.assert_close(found[3], scores[3], rtol=1e-5, atol=0)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["affine", "symmetric", "positive"])
def test_an_observed_search_gives_the_scale_of_the_search(bits, kind):
    """Exactly for a batch without histogram, by the criterion for a large one."""
    symmetric, positive = kind == "symmetric", kind == "positive"
    grid = Grid.signed(bits) if symmetric else Grid.unsigned(bits)
    x = torch.randn(40_000, generator=torch.Generator().manual_seed(7)) * 3 + 1
    x = x.abs() if positive else x
    for batch, slack in ((x[:8000], 1 + 1e-5), (x, 1.01)):
        seen = SearchObserver(bits, symmetric, positive, momentum=None)
        seen.update(batch)
        found = seen.affine(bits, symmetric, positive)
        exact = search(batch[None], bits, symmetric, positive)
        assert criterion(batch[None], *found, grid) <= slack * criterion(batch[None], *exact, grid)
        if len(batch) == 8000:
            torch.testing.assert_close(found, exact, rtol=1e-5, atol=0)


def test_zero_rows_get_the_smallest_scale():
    for ranges in (minmax, search):
        scale, zero_point = ranges(torch.zeros(2, 8), 4)
        assert (scale == torch.tensor(SMALLEST_SCALE)).all() and (zero_point == 0).all()


# -- running ranges ---------------------------------------------------------------------------------------------------

RUNNING = r"(?P<x>\w+)\.b(?P<bits>\d+)\.(?P<grid>affine|sym)\.init_(?P<init>minmax|mse)\.(?P<project>tfmq|qdiff)\.delta"


def two_sided(match):
    """Whether every batch has both signs."""
    batches = tensors(RUNNING_CASE)[f"{match['x']}.batches"].flatten(1)
    return bool((batches.amin(1) < 0).all() and (batches.amax(1) > 0).all())


# Q-Diffusion does not extend the running ends to 0; that makes no difference where every batch has both signs.
@each(RUNNING_CASE, RUNNING, lambda match: match["project"] == "tfmq" or two_sided(match))
def test_running_range_equals_the_published_one(match):
    values = tensors(RUNNING_CASE)
    prefix = match[0].removesuffix(".delta")
    name, grid, init = match["x"], match["grid"], match["init"]
    batches, bits, symmetric = values[f"{name}.batches"], int(match["bits"]), grid == "sym"
    momentum, _ = read(said(RUNNING_CASE, match[0]), RUNNING_END)
    running = RangeObserver(momentum)
    states = []
    for batch in batches:
        running.update(batch)
        states.append((*running.affine(bits, symmetric, positive=False), running.low.clone(), running.high.clone()))
    scale, zero_point, low, high = (torch.cat(column) for column in zip(*states, strict=True))
    # The search's scale lasts until the second batch only: from there on the published code uses the running ends.
    first = 1 if init == "mse" else 0
    torch.testing.assert_close(scale[first:], values[match[0]][first:], rtol=1e-5, atol=0)
    assert torch.equal(zero_point[first:], values[f"{prefix}.zero_point"][first:])
    torch.testing.assert_close(low, values[f"{name}.tfmq.x_min"], rtol=1e-5, atol=0)
    torch.testing.assert_close(high, values[f"{name}.tfmq.x_max"], rtol=1e-5, atol=0)
    y = fake_quantize(batches[-1], scale[-1], zero_point[-1], GRIDS[grid](bits))
    assert_same_codes(y, values[f"{prefix}.last_out"], scale[-1])
    if init == "mse":
        first_scale, first_point = search(batches[0].reshape(1, -1), bits, symmetric)
        torch.testing.assert_close(first_scale[0], values[match[0]][0], rtol=1e-6, atol=0)
        assert first_point[0] == values[f"{prefix}.zero_point"][0]


def test_widest_range_of_several_batches():
    widest = RangeObserver(momentum=None)
    for batch in ([1.0, 2.0], [-3.0, 0.5], [0.0, 9.0], [-1.0, 1.0]):
        widest.update(torch.tensor(batch))
    assert (widest.low.item(), widest.high.item()) == (-3, 9)
    scale, zero_point = widest.affine(4, symmetric=False, positive=False)
    assert torch.equal(scale, torch.tensor([0.8])) and zero_point.item() == 4


@pytest.mark.parametrize("momentum", [None, 0.95])
def test_every_step_has_its_own_range(momentum):
    together = RangeObserver(momentum, steps=3)
    alone = [RangeObserver(momentum) for _ in range(3)]
    generator = torch.Generator().manual_seed(4)
    for step in (2, 0, 1, 2, 2, 0):
        batch = (step + 1) * torch.randn(10, generator=generator)
        together.update(batch, step)
        alone[step].update(batch)
    scale, zero_point = together.affine(8, symmetric=False, positive=False)
    for step in range(3):
        expected = alone[step].affine(8, symmetric=False, positive=False)
        assert scale[step] == expected[0] and zero_point[step] == expected[1]


# -- softmax: zero point fixed at 0 -----------------------------------------------------------------------------------


@each(SOFTMAX_CASE, r"(?P<x>\w+)\.b(?P<bits>\d+)\.tfmq\.minmax\.delta")
def test_positive_range_equals_the_published_one(match):
    values = tensors(SOFTMAX_CASE)
    x, bits = values[f"{match['x']}.x"], int(match["bits"])
    seen = RangeObserver(momentum=None)
    seen.update(x)
    assert_positive_range(x, bits, seen.affine(bits, symmetric=False, positive=True), match)


@each(SOFTMAX_CASE, r"(?P<x>\w+)\.b(?P<bits>\d+)\.(?:tfmq|qdiff)\.mse\.delta")
def test_positive_search_equals_the_published_one(match):
    x, bits = tensors(SOFTMAX_CASE)[f"{match['x']}.x"], int(match["bits"])
    assert_positive_range(x, bits, search(x.reshape(1, -1), bits, positive=True), match)


def assert_positive_range(x, bits, found, match):
    values = tensors(SOFTMAX_CASE)
    scale, zero_point = found
    torch.testing.assert_close(scale[0], values[match[0]], rtol=1e-6, atol=0)
    assert zero_point.item() == 0
    y = fake_quantize(x, scale, zero_point, Grid.unsigned(bits))
    assert_same_codes(y, values[match[0].replace("delta", "out")], scale)


@each(SOFTMAX_CASE, r"(?P<x>\w+)\.b(?P<bits>\d+)\.(?:tfmq|qdiff)\.running\.delta")
def test_positive_running_range_equals_the_published_one(match):
    values = tensors(SOFTMAX_CASE)
    x = values[f"{match['x']}.x"]
    momentum, share, _ = read(said(SOFTMAX_CASE, match[0]), SOFTMAX_END)
    running = RangeObserver(momentum)
    running.update(share * x)
    running.update(x)
    scale, zero_point = running.affine(int(match["bits"]), symmetric=False, positive=True)
    torch.testing.assert_close(scale[0], values[match[0]], rtol=1e-6, atol=0)
    assert zero_point.item() == 0


# -- PTQ4DM's 100 thresholds -------------------------------------------------------------------------------------------


@each(SEARCH_CASE, r"(?P<x>\w+)\.b(?P<bits>\d+)\.sym\.(?P<granularity>channel|tensor)\.ptq4dm\.thr100\.dequant")
def test_threshold_search_equals_the_published_one(match):
    """To the bit. Activations pass through the running average, be it of one batch."""
    values, prefix = tensors(SEARCH_CASE), match[0].removesuffix("dequant")
    x, bits = values.get(match["x"], values.get(f"{match['x']}.x")), int(match["bits"])
    rows = rows_of(x, match["granularity"])
    if match["granularity"] == "tensor":
        _, momentum = read(said(SEARCH_CASE, f"{prefix}delta"), THRESHOLD_END)
        running = ThresholdObserver(bits, momentum)
        running.update(x)
        scale, zero_point = running.affine(bits, symmetric=False, positive=False)
    else:
        scale, zero_point = thresholds(rows, bits)
    assert torch.equal(scale, values[f"{prefix}delta"].reshape(-1))
    assert torch.equal(zero_point, values[f"{prefix}zero_point"].reshape(-1))
    y = fake_quantize(rows, scale[:, None], zero_point[:, None], Grid.unsigned(bits))
    assert_same_codes(y, values[match[0]].reshape(rows.shape), scale[:, None])


@each(SEARCH_CASE, r"(?P<x>zero_row)\.b(?P<bits>\d+)\.sym\.channel\.ptq4dm\.thr100\.delta")
def test_threshold_search_keeps_a_zero_row(match):
    values = tensors(SEARCH_CASE)
    rows = values[f"{match['x']}.x"].flatten(1)
    zero = (rows == 0).all(1)
    scale, _ = thresholds(rows, int(match["bits"]))
    assert zero.any() and scale.isfinite().all()
    torch.testing.assert_close(scale[zero], values[match[0]].reshape(-1)[zero], rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("sign", ["both", "positive", "negative"])
def test_threshold_search_is_the_best_of_all_ranges(bits, sign):
    """Against a plain loop over all thresholds, without the early end."""
    rows = torch.randn(3, 500, generator=torch.Generator().manual_seed(5)) * torch.tensor([[1.0], [0.1], [30.0]])
    rows[2, 0] = 300
    rows = {"both": rows, "positive": rows.abs(), "negative": -rows.abs()}[sign]
    found = criterion(rows, *thresholds(rows, bits), Grid.unsigned(bits))
    last = 2**bits - 1
    best = torch.full((3,), torch.inf)
    for c in range(1, 101):
        threshold = rows.abs().amax(1) / 100 * c
        low = -threshold if sign != "positive" else torch.zeros(3)
        high = threshold if sign != "negative" else torch.zeros(3)
        scale = (high - low) / last
        point = (-torch.round(low / scale)).clamp(0, last)
        best = torch.minimum(best, criterion(rows, scale, point, Grid.unsigned(bits)))
    torch.testing.assert_close(found, best, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bits", [2, 3])
def test_threshold_search_knows_how_far_a_two_sided_grid_reaches(bits):
    """Half of the values lie where the odd code reaches and the threshold does not."""
    row = torch.linspace(-0.3, 0.3, 1000)[None].clone()
    row[:, ::2] = 1.0
    found = criterion(row, *thresholds(row, bits), Grid.unsigned(bits))
    last = 2**bits - 1
    for c in range(1, 101):
        threshold = row.abs().amax(1) / 100 * c
        scale = 2 * threshold / last
        point = -torch.round(-threshold / scale)
        assert found <= criterion(row, scale, point, Grid.unsigned(bits)) * (1 + 1e-5)


@each(RUNNING_CASE, r"(?P<x>\w+)\.b(?P<bits>\d+)\.thr100\.ptq4dm\.last_out")
def test_running_thresholds_equal_the_published_ones(match):
    """To the bit, after each batch."""
    values, prefix = tensors(RUNNING_CASE), match[0].removesuffix("last_out")
    batches, bits = values[f"{match['x']}.batches"], int(match["bits"])
    _, momentum = read(said(RUNNING_CASE, f"{prefix}delta"), THRESHOLD_END)
    running = ThresholdObserver(bits, momentum)
    for index, batch in enumerate(batches):
        running.update(batch)
        scale, zero_point = running.affine(bits, symmetric=False, positive=False)
        found = {"delta": scale, "zero_point": zero_point, "low": running.low, "high": running.high}
        for name, value in found.items():
            assert torch.equal(value[0], values[prefix + name][index]), (name, index)
    y = fake_quantize(batches[-1], scale, zero_point, Grid.unsigned(bits))
    assert_same_codes(y, values[match[0]], scale)


@each(RUNNING_CASE, r"(?P<x>\w+)\.batches", two_sided)
def test_running_thresholds_are_the_average_of_each_batch_s_range(match):
    batches = tensors(RUNNING_CASE)[match[0]]
    running, high = ThresholdObserver(8, momentum=0.9), None
    for batch in batches:
        running.update(batch)
        scale, _ = thresholds(batch.reshape(1, -1), 8)
        found = scale * 255 / 2
        high = found if high is None else 0.9 * high + 0.1 * found
        torch.testing.assert_close(running.high, high, rtol=1e-5, atol=0)
        torch.testing.assert_close(running.low, -high, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bits", [4, 8])
def test_thresholds_of_a_large_batch_cost_no_more_than_an_exact_search(bits):
    x = torch.nn.functional.silu(2 * torch.randn(16, 40, 8, 8, generator=torch.Generator().manual_seed(6)))
    assert x.numel() > observer.HISTOGRAM_BINS
    running = ThresholdObserver(bits, momentum=None)
    running.update(x)
    exact = thresholds(x.reshape(1, -1), bits)
    found = running.affine(bits, symmetric=False, positive=False)
    scores = [criterion(x.reshape(1, -1), *pair, Grid.unsigned(bits)) for pair in (found, exact)]
    assert scores[0] <= 1.01 * scores[1]


def test_signs_are_those_of_the_first_batch():
    running = ThresholdObserver(4, momentum=0.9)
    running.update(torch.tensor([0.0, 1.0, 2.0]))
    running.update(torch.tensor([-5.0, 1.0, 2.0]))
    assert running.low == 0 and running.affine(4, symmetric=False, positive=False)[1] == 0
