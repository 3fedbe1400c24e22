"""Layers that a method leaves in full precision."""

from __future__ import annotations

import pytest
import torch

from tests.tfmq import networks
from tfmq.network.backbone import backbone_of
from tfmq.passes.leave_out import LeaveOut
from tfmq.passes.temporal_cache import temporal_feature_error
from tfmq.plan import Protocol, quantized_layers


def test_an_unknown_role_names_the_nearest():
    message = r"unknown role 'time_embeding': did you mean 'time_embedding'\? Allowed: attention_layers, "
    with pytest.raises(ValueError, match=message):
        networks.plan(networks.unconditional(), "w4a8", LeaveOut(("boundary", "time_embeding")))


@torch.no_grad()
def test_what_it_leaves_out_is_in_the_coverage_with_its_reason():
    roles = ("time_embedding", "time_projections")
    unet, full, pool, report = networks.quantized((LeaveOut(roles), *networks.recipe()))
    backbone = backbone_of(full)
    assert {row.path: row.reason for row in report.coverage if row.reason} == {
        path: f"the method leaves this out ({role.replace('_', ' ')})"
        for role in roles
        for path in backbone.roles[role]
    }
    assert not set(backbone.temporal) & set(quantized_layers(unet))
    assert temporal_feature_error(unet, full, backbone, pool.timesteps).abs().max() < 1e-12


def test_attention_products_can_be_left_out():
    _, full, _, report = networks.quantized((LeaveOut(("attention_products",)), *networks.recipe()))
    left = [row for row in report.coverage if row.reason]
    assert sorted(row.path for row in left) == sorted(2 * list(backbone_of(full).attentions))
    assert {row.reason for row in left} == {"the method leaves this out (attention products)"}
    assert {row.activation_bits for row in left} == {32}


def test_what_the_protocol_leaves_out_keeps_its_reason():
    unet = networks.unconditional()
    protocol = Protocol("published", {"first_time_layer": 32})
    plan = networks.plan(unet, "w4a8", LeaveOut(("time_embedding",)), protocol=protocol)
    assert plan.reasons == {
        "time_embedding.linear_1": "protocol published leaves this out (first time layer)",
        "time_embedding.linear_2": "the method leaves this out (time embedding)",
    }
