"""Widths of activations that vary over time steps."""

from __future__ import annotations

import torch

from tests.tfmq import networks
from tfmq.checkpoint import load_quantized, save_quantized
from tfmq.passes.activation_ranges import ActivationRanges
from tfmq.passes.step_bits import forward_snr, mix_ranges, quantization_snr, ranges_of, set_bits, smallest_bits
from tfmq.plan import activation_quantizers


def test_ratio_of_a_known_error():
    noise = torch.randn(3, 2, 3, 4, 4, generator=networks.generator())
    share = torch.tensor([0.5, 0.1, 0.01])
    predicted = noise * (1 + share.view(-1, 1, 1, 1, 1))
    snr = quantization_snr(noise, predicted, torch.tensor([801, 401, 1]))
    torch.testing.assert_close(snr, 1 / share.double().flip(0), rtol=1e-3, atol=0)
    snr = quantization_snr(noise, predicted, torch.tensor([401, 401, 1]))
    both = noise[:2].norm() / (predicted - noise)[:2].norm()
    torch.testing.assert_close(snr, torch.stack([1 / share[2], both]).double(), rtol=1e-3, atol=0)


def test_ratio_of_the_latents_is_signal_over_noise_power():
    alphas = torch.tensor([0.5, 0.1, 0.9], dtype=torch.float64)
    expected = alphas.sqrt().square() / (1 - alphas).sqrt().square()
    torch.testing.assert_close(forward_snr(alphas), expected)


def test_the_smallest_sufficient_width_is_chosen():
    snr = {4: torch.tensor([5.0, 5.0, 5.0]), 6: torch.tensor([20.0, 20.0, 20.0])}
    needed = torch.tensor([1.0, 10.0, 100.0])
    assert smallest_bits(snr, needed, largest=8).tolist() == [4, 6, 8]
    assert smallest_bits({4: snr[4]}, torch.tensor([5.0] * 3), largest=8).tolist() == [8] * 3  # above, not equal


@torch.no_grad()
def test_a_mixed_network_is_at_each_step_the_one_of_that_width(tmp_path):
    """With the boundary layers at 8 bits throughout, and the same from its checkpoint."""
    unet, full, pool, _ = networks.quantized(networks.recipe())
    session = networks.session(unet, full, pool)
    x, steps, chosen = networks.noise(), pool.timesteps.unique(), torch.tensor([8, 8, 4, 8, 4])
    at_bits, alone = {}, {}
    for bits in (4, 8):
        set_bits(unet, networks.plan(full, f"w4a{bits}"))
        for quantizer in activation_quantizers(unet).values():
            quantizer.enabled = False
        networks.run(session, ActivationRanges(), pool.spaced(5, 4, among=steps[chosen == bits]))
        at_bits[bits] = ranges_of(unet)
        alone[bits] = {int(t): unet(x, t).sample for t in steps}
    unet.step_tracker.steps = steps
    set_bits(unet, networks.plan(full, "w4a8"))
    mix_ranges(unet, at_bits, chosen)
    save_quantized(unet, tmp_path / "q.safetensors", {})
    for network in (unet, load_quantized(tmp_path / "q.safetensors")):
        for step, bits in zip(steps, chosen.tolist(), strict=True):
            assert torch.equal(network(x, step).sample, alone[bits][int(step)])
        together = network(x[:2], torch.stack([steps[0], steps[2]])).sample
        expected = torch.stack([alone[8][int(steps[0])][0], alone[4][int(steps[2])][1]])
        torch.testing.assert_close(together, expected, rtol=1e-3, atol=1e-3)
    quantizers = activation_quantizers(unet)
    assert quantizers["conv_in.input_quantizer"].step_bits.tolist() == [8] * 5
    assert quantizers["mid_block.resnets.0.conv1.input_quantizer"].step_bits.tolist() == chosen.tolist()
    assert not torch.equal(alone[4][int(steps[0])], alone[8][int(steps[0])])
