"""A diffusion transformer and a split, class-conditional UNet in OpenVINO."""

from __future__ import annotations

import pytest

from tests.tfmq.export.executed import check_executed

pytest.importorskip("openvino", reason="OpenVINO executes the networks: pip install tfmq-bench[deploy]")


@pytest.mark.parametrize(
    ("method", "precision", "protocol", "kind"),
    [
        ("tfmq", "w8a8", "deployable", "transformer"),
        ("qdiffusion", "w8a8", "shared", "class"),
    ],
)
def test_every_layer_executes_in_integers_and_the_network_is_the_simulated_one(
    method, precision, protocol, kind, tmp_path
):
    check_executed(method, precision, protocol, kind, tmp_path)
