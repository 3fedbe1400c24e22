"""Which layers get which block format."""

from __future__ import annotations

import pytest

from tests.tfmq import networks
from tests.tfmq.network import test_transformer
from tfmq.execution import executing
from tfmq.passes.block_formats import BlockFormats
from tfmq.passes.rectification import Rectification
from tfmq.passes.weight_ranges import RoundToNearest, WeightRanges
from tfmq.plan import LayerPlan, Protocol

RELU = Rectification(0, data=networks.ALL_ROWS)


def described(layer: LayerPlan) -> tuple:
    return layer.weight_bits, layer.activation_bits, layer.scales, layer.block, layer.unsigned


def test_the_ends_have_mxint8_and_what_is_between_has_4_bits():
    unet = networks.unconditional()
    plan = networks.plan(unet, "w4a4", RELU, BlockFormats())
    wide = ("conv_in", "down_blocks.0.resnets.0.", "up_blocks.1.resnets.1.", "conv_out")
    for path, layer in plan.layers.items():
        if f"{path}.".startswith(wide) or path.startswith(wide):
            assert described(layer) == (8, 8, "e8m0", 32, False), path
        else:
            unsigned = path.endswith(("conv1", "conv2", "time_emb_proj"))
            assert described(layer) == (4, 4, "e4m3", 16, unsigned), path
    assert len({described(layer) for layer in plan.layers.values()}) == 3
    assert all(attention.dynamic and attention.activation_bits == 4 for attention in plan.attentions.values())


def test_settings_move_the_ends_and_the_blocks():
    unet = networks.unconditional()
    plan = networks.plan(unet, "w4a4", BlockFormats(block=8, wide_block=64, wide_ends=0))
    assert {path for path, layer in plan.layers.items() if layer.weight_bits == 8} == {"conv_in", "conv_out"}
    assert {layer.block for layer in plan.layers.values()} == {8, 64}
    assert not any(layer.unsigned for layer in plan.layers.values()), "SiLU has negative outputs"
    with pytest.raises(ValueError, match="wide_ends"):
        BlockFormats(wide_ends=-1)


def test_what_a_protocol_leaves_in_full_precision_stays_so():
    protocol = Protocol("published", {"boundary": 8, "shortcuts": 32}, inputs={"time_projections": 32})
    unet = networks.unconditional()
    plan = networks.plan(unet, "w4a4", BlockFormats(), protocol=protocol)
    assert not any(path.endswith("conv_shortcut") for path in plan.layers)
    layer = plan.layers["mid_block.resnets.0.time_emb_proj"]
    assert described(layer) == (4, 32, "e4m3", 16, False)
    first = plan.layers["down_blocks.0.resnets.0.time_emb_proj"]
    assert described(first) == (8, 32, "e8m0", 32, False)


def test_transformers_have_wide_ends_too():
    plan = networks.plan(test_transformer.transformer(), "w4a4", RELU, BlockFormats())
    assert {described(layer)[:3] for path, layer in plan.layers.items()} == {(8, 8, "e8m0")}, "it has two blocks"
    plan = networks.plan(test_transformer.transformer(), "w4a4", RELU, BlockFormats(wide_ends=0))
    assert described(plan.layers["transformer_blocks.0.attn1.to_q"]) == (4, 4, "e4m3", 16, False)


def test_nothing_executes_them():
    network, *_ = networks.quantized((BlockFormats(), WeightRanges("minmax"), RoundToNearest()), "w8a8")
    with pytest.raises(ValueError, match="dynamic"):
        executing(network)
