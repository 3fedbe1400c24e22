"""SQ-DM, and the switch of DyQ-VLA: where they apply, and what their rows report."""

from __future__ import annotations

from dataclasses import replace

import pytest

from baselines import dyqvla, sqdm
from tests.tfmq import networks
from tests.tfmq.network import test_transformer
from tfmq.plan import activation_quantizers
from tfmq.precision import Precision

FEW = {"iterations": 2, "images": 4}


def test_sqdm_has_4_bits_and_nothing_else():
    assert not sqdm.objection(Precision.parse("w4a4"))
    for precision in ("w8a8", "w4a32", "w4a8"):
        assert "4 bits" in sqdm.objection(Precision.parse(precision))
    assert not sqdm.METHOD.executable and "kernels" in sqdm.METHOD.lacks("deployable")


def test_sqdm_reports_what_sparsity_would_save():
    network, _, pool, report = networks.quantized(sqdm.Config(**FEW).recipe(), "w4a4")
    assert not activation_quantizers(network), "nothing is calibrated"
    assert 0 < report.details["saved_operations"] < report.details["rectified_operations"] < 1
    assert 0.2 < report.details["zeros"] < 0.9 and len(report.details["zeros_by_step"]) == pool.steps
    bits = {(row.weight_bits, row.activation_bits) for row in report.coverage if "product" not in row.kind}
    assert bits == {(4, 4), (8, 8)} and not any(row.reason for row in report.coverage)


def test_sqdm_on_a_transformer_is_its_formats_alone():
    pool = test_transformer.pool(test_transformer.transformer())
    *_, report = networks.quantized(sqdm.Config(**FEW).recipe(), "w4a4", test_transformer.transformer, pool)
    assert report.details == {"rectified_operations": 0.0} and report.cost.optimizer_steps == 0


def test_the_switch_says_that_it_comes_from_another_field():
    assert "DyQ-VLA" in dyqvla.METHOD.label and "robotics" in dyqvla.METHOD.source
    assert "no method of diffusion models" in dyqvla.__doc__


def test_the_switch_needs_activations_of_4_bits_at_least():
    for precision in ("w8a8", "w4a8", "w4a4"):
        assert not dyqvla.objection(Precision.parse(precision))
    assert "full precision" in dyqvla.objection(Precision.parse("w4a32"))
    assert "2 bits less" in dyqvla.objection(Precision(4, 3))
    with pytest.raises(ValueError, match="caching is"):
        dyqvla.Config(caching="all")


@pytest.mark.parametrize("precision", ["w4a8", "w4a4"])
def test_the_switch_stays_at_the_bits_of_the_precision_on_average(precision):
    config = replace(dyqvla.Config(**FEW), temporal_iterations=2)
    network, _, pool, report = networks.quantized(config.recipe(), precision)
    asked = Precision.parse(precision).activation_bits
    bits = report.details["activation_bits"]
    counted = sum(bits[str(step)] for step in pool.timesteps.tolist()) / pool.steps
    assert report.details["average_activation_bits"] == pytest.approx(counted) and counted <= asked
    assert set(bits.values()) <= {asked - 2, asked, asked + 2}
    assert all(quantizer.step_bits is not None for quantizer in activation_quantizers(network).values())
