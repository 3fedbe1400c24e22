"""What a network's present state says: coverage, the plan that is stored, and weights that are those of their codes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.tfmq import networks
from tfmq.packing import checked_tensors, unpack
from tfmq.passes.leave_out import LeaveOut
from tfmq.passes.temporal_cache import TemporalCache
from tfmq.plan import LayerPlan, insert_quantizers, quantized_layers
from tfmq.state import coverage, plan_of, restore_weights


def whole(layers: dict[str, LayerPlan]) -> dict[str, LayerPlan]:
    """The plans of layers, where one group is no split."""
    return {path: replace(plan, splits=plan.splits * (len(plan.splits) > 1)) for path, plan in layers.items()}


def test_the_plan_is_read_off_the_layers():
    full = networks.unconditional()
    passes = networks.recipe(split_shortcuts=True)
    planned = networks.plan(full, "w4a8", *passes)
    insert_quantizers(full, planned)
    assert whole(plan_of(full).layers) == planned.layers and plan_of(full).attentions == planned.attentions

    unet, *_ = networks.quantized(passes, "w4a8")
    assert whole(plan_of(unet).layers) == planned.layers and plan_of(unet).reasons == planned.reasons
    unet.set_submodule("conv_in", nn.Conv2d(3, 16, 3, padding=1))
    assert whole(plan_of(unet).layers).keys() == planned.layers.keys() - {"conv_in"}


@pytest.mark.parametrize("where", ["all", "step"])
def test_layers_in_tables_are_planned_at_the_place_of_the_table(where):
    usual = networks.recipe(scales="temporal")
    passes = (TemporalCache(where), *usual) if where == "all" else (*usual, TemporalCache(where))
    unet, full, *_ = networks.quantized(passes, "w4a8")
    planned = networks.plan(full, "w4a8", *passes)
    assert whole(plan_of(unet).layers).items() <= planned.layers.items()
    assert {row.kind for row in coverage(unet) if row.path.endswith("time_emb_proj")} == {"lookup table"}


def test_coverage_keeps_what_was_left_out_apart_from_what_was_changed_later():
    passes = (LeaveOut(("time_embedding",)), *networks.recipe())
    unet, *_ = networks.quantized(passes, "w8a8")
    left = {row.path for row in coverage(unet) if row.reason}
    assert left == {"time_embedding.linear_1", "time_embedding.linear_2"}
    assert not any("after quantising" in row.reason for row in coverage(unet))
    unet.set_submodule("mid_block.resnets.0.conv1", nn.Conv2d(32, 32, 3, padding=1))
    (later,) = (row for row in coverage(unet) if "after quantising" in row.reason)
    assert (later.path, later.weight_bits, later.activation_bits) == ("mid_block.resnets.0.conv1", 32, 32)


@torch.no_grad()
def test_weights_of_codes_come_back():
    unet, *_ = networks.quantized(networks.recipe(), "w4a8")
    before = {path: layer.weight.clone() for path, layer in quantized_layers(unet).items()}
    for layer in quantized_layers(unet).values():
        layer.weight.mul_(1.01)
    assert all(row.weight_bits == 32 for row in coverage(unet))
    restore_weights(unet)
    assert all(torch.equal(layer.weight, before[path]) for path, layer in quantized_layers(unet).items())
    assert all(row.weight_bits <= 8 for row in coverage(unet) if "product" not in row.kind)
    with pytest.raises(ValueError, match="not quantised"):
        restore_weights(networks.unconditional())


def test_stored_codes_make_the_weights_by_scale_and_zero_point():
    unet, *_ = networks.quantized(networks.recipe(), "w4a8")
    tensors = checked_tensors(unet)
    for path, layer in quantized_layers(unet).items():
        codes = unpack(tensors[f"{path}.codes"], layer.weight_bits, layer.weight.shape).double()
        shape = (-1, *[1] * (layer.weight.dim() - 1))
        scale, zero = (tensors[f"{path}.weight_{part}"].double().view(shape) for part in ("scale", "zero_point"))
        torch.testing.assert_close(layer.weight.double(), (codes - zero) * scale, rtol=1e-6, atol=1e-7)
