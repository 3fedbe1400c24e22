"""The three protocols: which layers are quantised under each, by the papers and by the codes as they run."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

from baselines import tfmq
from benchmarks.suite import discover
from benchmarks.suite.record import PROTOCOLS
from tests.baselines.test_contract import METHODS
from tests.tfmq import networks
from tfmq.network.backbone import backbone_of
from tfmq.plan import plan_for
from tfmq.precision import FULL, Precision

W4A8 = Precision.parse("w4a8")


@pytest.mark.parametrize("name", METHODS)
def test_a_protocol_goes_by_its_name_and_names_roles_that_networks_have(name):
    method = discover.method(name)
    backbone = backbone_of(networks.unconditional())
    for protocol in PROTOCOLS:
        found = method.protocol(protocol)
        assert found is None or found.name == protocol
        assert found is None or {*found.bits, *found.inputs} <= set(backbone.roles)
    assert method.as_run is None or method.published is not None


def test_tfmq_dms_code_quantises_the_layers_that_were_seen_to_run(root):
    """54 layers of the LDM-4 have quantised weights in its code, 36 convolutions and 18 linear, and no attention."""
    path = root / "data" / "emoji-ldm4" / "unet" / "config.json"
    if not path.is_file():
        pytest.skip("data/emoji-ldm4 is not there: run `dvc pull data.dvc`")
    config = {k: v for k, v in json.loads(path.read_text(encoding="utf-8")).items() if not k.startswith("_")}
    with torch.device("meta"):
        unet = UNet2DModel(**config)
    plan = plan_for(unet, backbone_of(unet), W4A8, tfmq.METHOD.as_run)
    kinds = [type(unet.get_submodule(path)) for path, layer in plan.layers.items() if layer.weight_bits < FULL]
    assert (kinds.count(nn.Conv2d), kinds.count(nn.Linear)) == (36, 18)
    assert not plan.attentions
    inputs = {path for path, layer in plan.layers.items() if layer.activation_bits == FULL}
    assert inputs == {"time_embedding.linear_2", "down_blocks.0.resnets.0.conv1"}


def test_softmax_may_have_bits_of_its_own():
    unet = networks.conditional()
    found = plan_for(unet, backbone_of(unet), Precision.parse("w4a4"), discover.method("qdiffusion").as_run)
    assert {(plan.activation_bits, plan.softmax_bits) for plan in found.attentions.values()} == {(4, 8)}
