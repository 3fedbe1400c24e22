"""Attention over a large batch is evaluated some images at a time: with the same outputs, ranges and gradients."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from tfmq.modules.attention import QuantizedAttention
from tfmq.modules.fake_quantize import StepTracker

IMAGES, TOKENS, HEADS = 5, 7, 2
STEPS = torch.tensor([1, 401, 801])
ROWS = torch.tensor([801, 1, 401, 1, 801])


def attention(most_bytes: int, dynamic: bool = False) -> Attention:
    torch.manual_seed(0)
    module = Attention(query_dim=8, heads=HEADS, dim_head=4, cross_attention_dim=6)
    tracker = StepTracker()
    tracker.steps = STEPS
    processor = QuantizedAttention(8, 8, tracker, dynamic=dynamic)
    processor.most_bytes = most_bytes
    module.set_processor(processor)
    tracker.set(ROWS)
    return module.eval().requires_grad_(False)


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(IMAGES, TOKENS, 8, generator=generator), torch.randn(IMAGES, 3, 6, generator=generator)


def calibrated(most_bytes: int, momentum: float | None, per_step: bool) -> Attention:
    module = attention(most_bytes)
    quantizers = (module.processor.query, module.processor.key, module.processor.value, module.processor.probabilities)
    for quantizer in quantizers:
        quantizer.observe(momentum, per_step)
    x, context = inputs()
    for scale in (1.0, 3.0):
        module(scale * x, context)
    for quantizer in quantizers:
        quantizer.freeze()
    return module


def test_until_it_is_calibrated_the_processor_that_it_replaces_computes():
    """So what is learned before does not depend on whether activations will be quantised."""
    x, context = inputs()
    plain = attention(2**30)
    plain.set_processor(AttnProcessor2_0())
    assert torch.equal(attention(2**30)(x, context), plain(x, context))
    calibrated_one = calibrated(2**30, None, False)
    assert not torch.equal(calibrated_one(x, context), plain(x, context))
    for quantizer in calibrated_one.processor.children():
        quantizer.enabled = False
    assert torch.equal(calibrated_one(x, context), plain(x, context))
    seen = []
    for quantizer in calibrated_one.processor.children():
        quantizer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[-1]))
    calibrated_one(x, context)
    assert seen == [4, 4, 4, 3], "channels of a head in query, key and value, and 3 tokens to attend to"
    assert not torch.equal(attention(2**30, dynamic=True)(x, context), plain(x, context))


# What two images of 2 heads x 7 x 3 probabilities take, and what none does: one image is the least.
@pytest.mark.parametrize("most_bytes", [2 * 2 * 7 * 3 * 4, 1])
@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("momentum", [None, 0.95])
def test_ranges_outputs_and_gradients_are_those_of_the_whole_batch(most_bytes, per_step, momentum, monkeypatch):
    whole, sliced = (calibrated(limit, momentum, per_step) for limit in (2**30, most_bytes))
    scales = [module.processor.probabilities.scale for module in (whole, sliced)]
    torch.testing.assert_close(*scales)
    assert len(scales[0]) == (3 if per_step else 1)
    sliced.processor.probabilities.scale = scales[0].clone()
    sizes = []
    scores = Attention.get_attention_scores
    monkeypatch.setattr(
        Attention, "get_attention_scores", lambda self, q, k, m: (sizes.append(len(q)), scores(self, q, k, m))[1]
    )
    found = []
    for module in (whole, sliced):
        x, context = inputs()
        scale = module.processor.probabilities.scale.requires_grad_()
        output = module(x.requires_grad_(), context)
        output.square().sum().backward()
        with torch.no_grad():
            found.append((module(x, context), output, x.grad, scale.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one)
    most = 4 if most_bytes > 1 else 2
    assert sizes[:2] == [10, 10] and max(sizes[2:]) == most
    # Forward, again for gradients, and without gradients.
    assert sum(sizes[2:]) == 3 * 10


def test_dynamic_ranges_are_those_of_the_whole_batch():
    x, context = inputs()
    torch.testing.assert_close(attention(1, dynamic=True)(x, context), attention(2**30, dynamic=True)(x, context))


def test_ranges_by_search_see_the_whole_batch_at_once():
    found = []
    for most_bytes in (1, 2**30):
        module = attention(most_bytes)
        module.processor.probabilities.observe(activation_range="search")
        module(*inputs())
        module.processor.probabilities.freeze()
        found.append(module.processor.probabilities.scale)
    assert torch.equal(*found)
