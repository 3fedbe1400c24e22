"""Activation quantisers: their lifecycle, and tables that are looked up by time step."""

from __future__ import annotations

import pytest
import torch

from tfmq.modules.fake_quantize import FakeQuantize, SplitFakeQuantize, StepTracker


def tracker_of(*steps: int) -> StepTracker:
    tracker = StepTracker()
    tracker.steps = torch.tensor(steps)
    return tracker


def test_observing_passes_the_input_and_freezing_quantises_it():
    quantizer = FakeQuantize(4, StepTracker())
    x = torch.linspace(-1, 2, 61)
    assert torch.equal(quantizer(x), x)
    quantizer.observe()
    assert torch.equal(quantizer(x), x)
    quantizer.freeze()
    expected = torch.fake_quantize_per_tensor_affine(x, 3 / 15, 5, 0, 15)
    torch.testing.assert_close(quantizer(x), expected)


def test_a_table_gives_each_step_its_own_range_whatever_the_order():
    quantizer = FakeQuantize(8, tracker_of(1, 401, 801))
    quantizer.observe(per_step=True)
    peaks = {801: 4.0, 1: 0.5, 401: 2.0}
    for step, peak in peaks.items():
        quantizer.tracker.set(step)
        quantizer(torch.tensor([-peak, peak]))
    quantizer.freeze()
    torch.testing.assert_close(quantizer.scale, torch.tensor([0.5, 2.0, 4.0]) * 2 / 255)
    x = torch.randn(3, 4)
    together = FakeQuantize.forward
    quantizer.tracker.set(torch.tensor([401, 1, 401]))
    mixed = together(quantizer, x)
    for row, step in enumerate((401, 1, 401)):
        quantizer.tracker.set(step)
        assert torch.equal(quantizer(x[row : row + 1])[0], mixed[row])


def test_an_unknown_step_is_refused_by_value():
    tracker = tracker_of(1, 401, 801)
    with pytest.raises(ValueError, match="no activation range for time step 402"):
        tracker.set(torch.tensor([401, 402]))


def test_constant_activations_are_named():
    quantizer = FakeQuantize(8, StepTracker())
    quantizer.path = "conv_in.input_quantizer"
    quantizer.observe()
    quantizer(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"conv_in\.input_quantizer is constant \(0\)"):
        quantizer.freeze()


def test_nan_while_observing_names_layer_and_step():
    quantizer = FakeQuantize(8, tracker_of(1, 401))
    quantizer.path = "mid_block"
    quantizer.observe()
    quantizer.tracker.set(401)
    with pytest.raises(ValueError, match="mid_block holds NaN or infinity at time step 401"):
        quantizer(torch.tensor([1.0, float("nan")]))


def test_probabilities_of_a_single_key_are_no_error():
    quantizer = FakeQuantize(8, StepTracker(), positive=True)
    quantizer.observe()
    quantizer(torch.ones(2, 4, 1))
    quantizer.freeze()
    assert torch.equal(quantizer(torch.ones(2, 4, 1)), torch.ones(2, 4, 1))


def test_a_batch_passes_quantised_while_thresholds_are_observed():
    quantizer = FakeQuantize(4, StepTracker())
    quantizer.observe(momentum=0.9, activation_range="thresholds")
    x = torch.randn(100, generator=torch.Generator().manual_seed(0))
    passed = quantizer(x)
    assert len(passed.unique()) <= 16
    quantizer.freeze()
    assert torch.equal(quantizer(x), passed)


@pytest.mark.parametrize(("bits", "like"), [(4, "search"), (8, "minmax")])
def test_few_bits_clip_what_is_rare(bits, like):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) ** 3
    scales = {}
    for activation_range in ("by_bits", "minmax", "search"):
        quantizer = FakeQuantize(bits, StepTracker())
        quantizer.observe(activation_range=activation_range)
        quantizer(x)
        quantizer.freeze()
        scales[activation_range] = float(quantizer.scale)
    assert scales["by_bits"] == scales[like]
    assert bits == 8 or scales["search"] < scales["minmax"]


def test_many_bits_cover_all_that_was_seen():
    """Where ranges are chosen by bits, no running average forgets the one batch of large values."""
    quantizer = FakeQuantize(8, StepTracker())
    quantizer.observe(momentum=0.95, activation_range="by_bits")
    for largest in (1.0, 30.0, 1.0):
        quantizer(torch.tensor([0.0, largest]))
    quantizer.freeze()
    assert quantizer(torch.tensor([30.0])).item() == pytest.approx(30.0)


def test_symmetric_thresholds_have_a_signed_grid():
    quantizer = FakeQuantize(4, StepTracker(), symmetric=True)
    quantizer.observe(momentum=0.9, activation_range="thresholds")
    x = torch.randn(100, generator=torch.Generator().manual_seed(0)).abs()
    quantizer(x)
    quantizer.freeze()
    assert float(quantizer.zero_point) == 0 and 0 < float(quantizer.scale) <= float(x.max()) / 7 * (1 + 1e-6)


def test_mixed_bits_are_looked_up_by_step():
    quantizer = FakeQuantize(8, tracker_of(1, 401, 801))
    bits, scale, zero_point = torch.tensor([8, 8, 4]), torch.tensor([0.01, 0.02, 0.3]), torch.tensor([100.0, 90.0, 7.0])
    quantizer.mix_bits(bits, scale, zero_point)
    x = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(1))
    alone = []
    for row, (step, width) in enumerate(((801, 4), (1, 8), (401, 8))):
        quantizer.tracker.set(step)
        alone.append(quantizer(x[row]))
        index = [1, 401, 801].index(step)
        args = (float(scale[index]), int(zero_point[index]), 0, 2**width - 1)
        torch.testing.assert_close(alone[-1], torch.fake_quantize_per_tensor_affine(x[row], *args))
    quantizer.tracker.set(torch.tensor([801, 1, 401]))
    assert torch.equal(quantizer(x), torch.stack(alone))
    single = FakeQuantize(8, tracker_of(801))
    single.mix_bits(bits[2:], scale[2:], zero_point[2:])
    single.tracker.set(801)
    assert torch.equal(single(x[0]), alone[0]), "a schedule of one step"
    with pytest.raises(ValueError, match="widths that vary"):
        FakeQuantize(8, StepTracker(), symmetric=True).mix_bits(bits, scale, zero_point)


def test_split_quantises_each_group_with_its_own_range():
    parts = [FakeQuantize(8, StepTracker()) for _ in range(2)]
    split = SplitFakeQuantize((3, 2), parts)
    x = torch.randn(4, 5, 2, 2)
    x[:, 3:] *= 50
    for part in parts:
        part.observe()
    split(x)
    for part in parts:
        part.freeze()
    assert torch.equal(split(x), torch.cat([parts[0](x[:, :3]), parts[1](x[:, 3:])], 1))
    assert parts[1].scale > 10 * parts[0].scale
