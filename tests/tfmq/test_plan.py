"""Which layers a protocol quantises, and what is said of those that it leaves out."""

from __future__ import annotations

import pytest

from tests.tfmq import networks
from tfmq.network.backbone import backbone_of
from tfmq.passes.grids import Grids
from tfmq.passes.reconstruction import RoundingConfig
from tfmq.passes.temporal_cache import temporal_feature_error
from tfmq.plan import Protocol, insert_quantizers, plan_for
from tfmq.precision import Precision
from tfmq.state import coverage


def test_a_protocol_decides_what_is_quantised():
    full = networks.unconditional()
    backbone = backbone_of(full)
    bits = {"boundary": 8, "shortcuts": 32, "attention_products": 32, "time_embedding": 8, "first_time_layer": 32}
    plan = plan_for(full, backbone, Precision.parse("w4a4"), Protocol("published", bits))
    assert plan.layers["conv_in"].weight_bits == plan.layers["conv_out"].activation_bits == 8
    assert plan.layers["time_embedding.linear_2"].weight_bits == 8 and "time_embedding.linear_1" not in plan.layers
    shortcuts, *others = (backbone.roles[role] for role in ("shortcuts", "downsampling", "attention_layers"))
    assert shortcuts and not set(shortcuts) & set(plan.layers) and not plan.attentions
    assert "shortcuts" in plan.reasons[shortcuts[0]]
    assert [plan.layers[paths[0]].weight_bits for paths in others] == [4, 4]
    with pytest.raises(ValueError, match="shortcutz"):
        plan_for(full, backbone, Precision.parse("w4a4"), Protocol("published", {"shortcutz": 32}))


def test_what_a_protocol_leaves_out_is_in_the_coverage_with_its_reason():
    protocol = Protocol("published", {"time_embedding": 32, "time_projections": 32})
    passes = networks.recipe(scales="temporal", rounding=RoundingConfig(2))
    unet, full, pool, report = networks.quantized(passes, protocol=protocol)
    backbone = backbone_of(full)
    left = {row.path: row.reason for row in report.coverage if row.reason}
    assert set(left) == set(backbone.temporal) and all("protocol published" in reason for reason in left.values())
    assert temporal_feature_error(unet, full, backbone, pool.timesteps).abs().max() < 1e-12


def test_coverage_needs_a_quantised_network():
    with pytest.raises(ValueError, match="the network is not quantised: call quantize_ first"):
        coverage(networks.unconditional())


def test_quantizers_follow_their_network_to_its_device():
    unet = networks.unconditional().to("meta")
    insert_quantizers(unet, networks.plan(unet, "w4a8", Grids(split_shortcuts=True)))
    assert {buffer.device.type for buffer in unet.buffers()} == {"meta"}


def test_what_activations_get_is_described_where_it_decides():
    """Until they are calibrated the widths and signs of activations change nothing; dynamic ones always do."""
    unet = networks.unconditional()
    first, second = (networks.plan(unet, precision) for precision in ("w4a8", "w4a4"))
    assert first.described(activations=False) == second.described(activations=False)
    assert first.described(activations=True) != second.described(activations=True)
    signed = networks.plan(unet, "w4a8", Grids(symmetric_activations=True))
    assert signed.described(activations=False) == first.described(activations=False)
    assert signed.described(activations=True) != first.described(activations=True)
    assert networks.plan(unet, "w4a32").described(activations=False) == first.described(activations=False)
    assert networks.plan(unet, "w8a8").described(activations=False) != first.described(activations=False)
    split = networks.plan(unet, "w4a8", Grids(split_shortcuts=True))
    assert split.described(activations=False) != first.described(activations=False)
    first, second = (networks.plan(unet, p, Grids(dynamic_activations=True)) for p in ("w4a8", "w4a4"))
    assert first.described(activations=False) != second.described(activations=False)
