"""Every method quantises a network in half precision as it does the network's copy in float32."""

from __future__ import annotations

import pytest
import torch

from benchmarks.suite import discover
from tests.baselines.test_contract import METHODS, small
from tests.tfmq import networks
from tests.tfmq.test_number_types import assert_same_quantisation, twins
from tfmq.checkpoint import load_quantized, save_quantized
from tfmq.network.backbone import evaluate


@pytest.mark.filterwarnings("ignore:this network carries a noise correction")
@pytest.mark.parametrize("name", METHODS)
def test_bfloat16(name, tmp_path):
    network, copied, pool = twins(torch.bfloat16, small(discover.method(name)).recipe())
    assert_same_quantisation(network, copied)
    save_quantized(network, tmp_path / "quantized.safetensors", {})
    loaded = load_quantized(tmp_path / "quantized.safetensors")
    assert_same_quantisation(loaded, copied)
    with torch.no_grad():
        found, again = (evaluate(each, networks.noise(2), pool.timesteps[1]) for each in (network, loaded))
    assert found.dtype == torch.bfloat16 and torch.isfinite(found).all() and torch.equal(again, found)
