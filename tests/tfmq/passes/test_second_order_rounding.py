"""Rounding in closed form: nearer to full precision than rounding to nearest, planned, kept, and for every network."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.tfmq import networks
from tests.tfmq.network import test_transformer
from tfmq.cost import plan_cost
from tfmq.network.sampling import predict_noise
from tfmq.passes.activation_ranges import ActivationRanges
from tfmq.passes.grids import Grids
from tfmq.passes.second_order_rounding import SecondOrderRounding, samples
from tfmq.passes.weight_ranges import RoundToNearest, WeightRanges
from tfmq.precision import Precision
from tfmq.quantization import quantize_
from tfmq.workspace import FolderWorkspace

ROUNDING = SecondOrderRounding(data=networks.ALL_ROWS, pixels=64)
W4 = Precision.parse("w4a32")


@torch.no_grad()
def error(network, full, conditioning=None) -> float:
    found, expected = (
        predict_noise(u, networks.noise(4), torch.tensor(401), conditioning, 1.0) for u in (network, full)
    )
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_it_is_nearer_to_full_precision_than_rounding_to_nearest(share):
    rounding = SecondOrderRounding(share=share, data=networks.ALL_ROWS, pixels=64)
    network, full, pool, report = networks.quantized((Grids(split_shortcuts=True), WeightRanges(), rounding), "w4a32")
    nearest, *_ = networks.quantized((WeightRanges(), RoundToNearest()), "w4a32", recorded=pool)
    assert error(network, full) < 0.75 * error(nearest, full)
    assert all(row.weight_bits <= 8 for row in report.coverage if row.kind in ("conv2d", "linear"))


@pytest.mark.parametrize("kind", ["text", "transformer"])
def test_other_networks(kind):
    if kind == "transformer":
        network, full = test_transformer.transformer(), test_transformer.transformer()
        pool = test_transformer.pool(full)
    else:
        network, full = networks.conditional(), networks.conditional()
        pool = networks.KINDS[kind].pool(full)
    recipe = (WeightRanges(), ROUNDING, ActivationRanges(networks.ALL_ROWS))
    quantize_(network, Precision.parse("w4a8"), recipe, pool, networks.generator())
    rows = pool.spaced(5, 1)
    with torch.no_grad():
        from tfmq.network.backbone import evaluate

        found, expected = (evaluate(each, rows.latents, rows.timesteps, rows.context) for each in (network, full))
    assert (found - expected).norm() < 0.3 * expected.norm()


def test_what_it_spends_is_planned_and_what_was_found_is_kept(tmp_path):
    full = networks.unconditional()
    pool, recipe = networks.pool(full), (WeightRanges(), ROUNDING)
    planned = plan_cost(networks.unconditional().to("meta"), W4, recipe, pool)
    made = []
    for _ in range(2):
        network = networks.unconditional()
        report = quantize_(network, W4, recipe, pool, networks.generator(), workspace=FolderWorkspace(tmp_path))
        assert planned.costs[1][1].unet_evaluations == report.passes[1].unet_evaluations == 4 * 20
        made.append(network.state_dict())
    assert planned.held > 0
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


def test_samples_of_a_convolution_are_its_patches():
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 5, 3, stride=2, padding=1)
    x = torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        for pixels in (4, 100):
            patches, outputs = samples(layer, x, layer(x), pixels, networks.generator())
            assert len(patches) == 2 * min(pixels, 25)
            torch.testing.assert_close(patches @ layer.weight.flatten(1).T + layer.bias, outputs)


def test_settings_that_make_no_sense_are_refused():
    for wrong in ({"share": 1.5}, {"pixels": 0}, {"damping": -1.0}, {"range": "best"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SecondOrderRounding(**wrong)
