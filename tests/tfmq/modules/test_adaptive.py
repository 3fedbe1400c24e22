"""Probabilities on a uniform or a logarithmic grid, at each time step."""

from __future__ import annotations

import pytest
import torch

from tfmq.modules.adaptive import AdaptiveQuantize, DistributionObserver
from tfmq.modules.fake_quantize import FakeQuantize, StepTracker
from tfmq.numerics.logarithmic import log2_fake_quantize

SHAPE = (2, 3, 40, 40)  # images, heads, queries and keys


def probabilities(sharpness, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(sharpness * torch.randn(SHAPE, generator=generator), -1)


def uniform(seed=0):
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(seed)) / 20 + 1e-3


def frozen(*batches, per_step=True, bits=4):
    """A quantiser that has seen a batch at each of the steps 1, 2, ..."""
    tracker = StepTracker()
    tracker.steps = torch.arange(1, len(batches) + 1)
    quantizer = AdaptiveQuantize(bits, tracker)
    quantizer.observe_distribution(1000, 0.05, per_step)
    for step, batch in enumerate(batches, 1):
        tracker.set(step)
        assert quantizer(batch) is batch, "observed probabilities pass as they are"
    quantizer.freeze()
    return quantizer


def plain(x, bits=4):
    quantizer = FakeQuantize(bits, StepTracker(), positive=True)
    quantizer.observe()
    quantizer(x)
    quantizer.freeze()
    return quantizer(x)


def test_each_step_has_the_grid_of_its_distribution():
    sharp, flat = probabilities(4.0), uniform()
    quantizer = frozen(sharp, flat)
    assert quantizer.logarithmic.tolist() == [1, 0]
    quantizer.tracker.set(1)
    found = quantizer(sharp)
    assert torch.equal(found, log2_fake_quantize(sharp, sharp.max(), 4))
    relative = [((each - sharp).abs() / sharp).median() for each in (found, plain(sharp))]
    assert relative[0] < 0.42 < relative[1] == 1, "a uniform grid rounds most of them to 0"
    quantizer.tracker.set(2)
    assert torch.equal(quantizer(flat), plain(flat))


def test_rows_of_different_steps_have_their_own_grids():
    sharp, flat = probabilities(4.0), uniform()
    quantizer = frozen(sharp, flat)
    quantizer.tracker.set(torch.tensor([2, 1]))
    found = quantizer(torch.stack([flat[0], sharp[0]]))
    for row, (step, x) in enumerate(((2, flat[:1]), (1, sharp[:1]))):
        quantizer.tracker.set(step)
        torch.testing.assert_close(found[row], quantizer(x)[0])


def test_one_grid_serves_all_steps_if_asked():
    sharp = probabilities(4.0)
    quantizer = frozen(sharp, sharp / 2, per_step=False)
    assert quantizer.logarithmic.tolist() == [1] and not quantizer.per_step
    assert quantizer.scale.item() == sharp.max()
    assert torch.equal(quantizer(sharp), log2_fake_quantize(sharp, sharp.max(), 4))


def test_its_largest_value_learns_like_a_step_size():
    sharp = probabilities(4.0)
    quantizer = frozen(sharp, per_step=False)
    quantizer.scale = quantizer.scale.clone().requires_grad_()
    quantizer(sharp).sum().backward()
    assert quantizer.scale.grad.shape == (1,) and quantizer.scale.grad.abs() > 0


def test_observed_as_usual_its_grid_is_uniform():
    sharp = probabilities(4.0)
    quantizer = AdaptiveQuantize(4, StepTracker())
    quantizer.observe()
    quantizer(sharp)
    quantizer.freeze()
    assert not quantizer.logarithmic.any() and torch.equal(quantizer(sharp), plain(sharp))


def test_its_state_is_stored_and_loaded_with_tables_of_any_length():
    quantizer = frozen(probabilities(4.0), uniform(), probabilities(3.0))
    other = AdaptiveQuantize(4, quantizer.tracker)
    other.scale, other.zero_point = torch.empty(3), torch.empty(3)  # as `tfmq.packing.restore` makes room
    other.load_state_dict(quantizer.state_dict())
    other.enabled = True
    quantizer.tracker.set(3)
    x = probabilities(3.0)
    assert torch.equal(other(x), quantizer(x)) and other.logarithmic.tolist() == [1, 0, 1]
    with pytest.raises(RuntimeError, match="logarithmic"):
        other.load_state_dict({name: part for name, part in quantizer.state_dict().items() if name != "logarithmic"})


def test_a_single_key_and_a_width_that_varies():
    quantizer = frozen(torch.ones(2, 4, 1))
    assert torch.equal(quantizer(torch.ones(2, 4, 1)), torch.ones(2, 4, 1))
    with pytest.raises(ValueError, match="its width can not vary"):
        quantizer.mix_bits(torch.tensor([4]), torch.ones(1), torch.zeros(1))


def test_samples_are_spread_over_all_keys_and_queries():
    observer = DistributionObserver(400, 0.05)
    x = torch.arange(64 * 64.0).view(1, 1, 64, 64) + 1
    observer.update(x)
    seen = observer.values[0][0].long() - 1
    assert len(seen) == 400 == len(seen.unique())
    assert len((seen % 64).unique()) == len((seen // 64).unique()) == 64
    assert observer.high.item() == 64 * 64
