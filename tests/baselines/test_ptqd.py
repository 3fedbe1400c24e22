"""PTQD's rows carry their correction, and the mixed one its widths."""

from __future__ import annotations

import pytest
import torch

from baselines import ptqd, ptqd_mixed
from tests.tfmq import networks
from tfmq.passes.correction import correction_of, measure_correction
from tfmq.plan import activation_quantizers
from tfmq.precision import Precision
from tfmq.quantization import quantize_

FEW = {"iterations": 2, "activation_iterations": 2, "images": 4}


@pytest.mark.parametrize("precision", ["w4a8", "w4a32"])
def test_the_correction_is_that_of_the_finished_network(precision):
    unet = networks.unconditional()
    pool = networks.pool(unet)
    recipe = ptqd.METHOD.config(**FEW).recipe()
    with pytest.warns(UserWarning, match="carries a noise correction"):
        report = quantize_(unet, Precision.parse(precision), recipe, pool, networks.generator())
    kept, again = correction_of(unet).state_dict(), measure_correction(unet, pool, 4, 32).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in kept.items())
    assert (correction_of(unet).deviations > 0).all()
    assert report.cost.unet_evaluations >= 5 * 4


@pytest.mark.parametrize(("power", "expected"), [(-100.0, {8}), (0.0, {4, 8})])
def test_widths_follow_the_rule_and_are_reported(power, expected):
    """The power of the ratio moves the rule: at 0, 4 bits where the latents hold more noise than signal."""
    unet = networks.unconditional()
    pool = networks.pool(unet)
    recipe = ptqd_mixed.METHOD.config(**FEW, snr_power=power).recipe()
    report = quantize_(unet, Precision.parse("w4a8"), recipe, pool, networks.generator())
    bits = report.details["activation_bits"]
    assert set(bits.values()) == expected and set(bits) == {str(t) for t in pool.timesteps.tolist()}
    for step, alpha in zip(pool.timesteps.tolist(), pool.alphas.tolist(), strict=False):
        if power == 0:
            assert bits[str(step)] == (4 if alpha < 0.5 else 8)
    for path, quantizer in activation_quantizers(unet).items():
        widths = [bits[str(t)] for t in unet.step_tracker.steps.tolist()]
        assert quantizer.step_bits.tolist() == ([8] * 5 if path.startswith(("conv_in", "conv_out")) else widths)
    assert correction_of(unet) is not None


def test_a_step_that_the_schedule_repeats_gets_one_width():
    kind = networks.KINDS["text"]
    unet = kind.build()
    pool = kind.pool(unet)
    recipe = ptqd_mixed.METHOD.config(**FEW, snr_power=0.0).recipe()
    report = quantize_(unet, Precision.parse("w4a8"), recipe, pool, networks.generator())
    finite_set = pool.timesteps.unique()
    assert len(finite_set) == 5 and pool.steps == 6
    alphas = networks.scheduler().alphas_cumprod[finite_set]
    expected = {str(t): 4 if alpha < 0.5 else 8 for t, alpha in zip(finite_set.tolist(), alphas, strict=True)}
    assert report.details["activation_bits"] == expected and set(expected.values()) == {4, 8}
    for name in ("quantization_snr", "forward_snr"):
        assert report.details[name].keys() == expected.keys()
    assert torch.equal(correction_of(unet).timesteps, finite_set)


def test_mixing_needs_a_width_above_the_smallest():
    assert not ptqd_mixed.objection(Precision.parse("w4a8"))
    assert "full precision" in ptqd_mixed.objection(Precision.parse("w4a32"))
    assert "larger" in ptqd_mixed.objection(Precision.parse("w4a4"))


@pytest.mark.parametrize("settings", [{"caching": "all"}, {"caching": "step"}, {"activation_scales": "per_step"}])
def test_settings_that_leave_nothing_to_mix_are_refused(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} is"):
        ptqd_mixed.METHOD.config(**settings)
