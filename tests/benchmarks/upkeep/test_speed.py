"""Timing of executed networks: medians with intervals, and rounds in turns."""

from __future__ import annotations

import pytest

from benchmarks.upkeep import speed
from tests.tfmq.network.test_transformer import transformer
from tests.tfmq.networks import unconditional
from tfmq.modules.integer_products import cpu_is_exact


def test_ratios_are_those_of_the_rounds():
    text = speed.table({"float32": [2.0, 4.0, 8.0], "executed": [1.0, 2.0, 2.0]})
    assert "executed / float32: 0.5 [0.25, 0.5]" in text


@pytest.mark.skipif(not cpu_is_exact(), reason="the 8-bit kernels of this processor are not exact")
@pytest.mark.parametrize("build", [unconditional, transformer])
def test_a_network_is_timed_and_listed(build, tmp_path, capsys):
    build().save_pretrained(tmp_path)
    speed.main([str(tmp_path), "--batch", "2", "--rounds", "2"])
    shown = capsys.readouterr().out
    assert "executed / simulated" in shown and "attention products: 8-bit integers" in shown
    assert "float32 " in shown and "conv2d: float32" not in shown
