"""How large the files of an export are."""

from __future__ import annotations

import pytest

from tests.tfmq import networks
from tests.tfmq.export.executed import SHAPE
from tfmq.export.openvino import export_openvino
from tfmq.export.roughly import quantize_roughly_
from tfmq.precision import Precision

pytest.importorskip("openvino", reason="OpenVINO executes the networks: pip install tfmq-bench[deploy]")


def test_weights_of_4_bits_take_4_bits_in_the_file(tmp_path):
    sizes = {}
    for precision in ("w4a8", "w8a8"):
        network = networks.unconditional()
        quantize_roughly_(network, Precision.parse(precision), [1, 401])
        export_openvino(network, tmp_path / precision, SHAPE)
        sizes[precision] = (tmp_path / precision / "openvino_model.bin").stat().st_size
    weights = sum(p.numel() for name, p in networks.unconditional().named_parameters() if p.dim() > 1)
    assert sizes["w8a8"] - sizes["w4a8"] > 0.4 * weights
