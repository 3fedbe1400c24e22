"""Which grids layers and attentions get, in the plan and in the network."""

from __future__ import annotations

import pytest
import torch

from tests.tfmq import networks
from tfmq.modules.dynamic import DynamicQuantize
from tfmq.network.backbone import backbone_of
from tfmq.passes.grids import Grids, group_sizes
from tfmq.passes.weight_ranges import RoundToNearest, WeightRanges
from tfmq.plan import activation_quantizers, quantized_layers


def test_groups_cover_the_channels():
    assert group_sizes(10, 4) == (4, 4, 2)
    assert group_sizes(8, 4) == (4, 4)
    assert group_sizes(3, 128) == (3,)


def test_groups_without_dynamic_activations_are_refused():
    with pytest.raises(ValueError, match="go with dynamic activations"):
        Grids(weight_group=4)


def test_the_usual_grids_are_what_a_plan_begins_with():
    unet = networks.unconditional()
    assert networks.plan(unet, "w4a8", Grids()) == networks.plan(unet, "w4a8")


def test_halves_of_concatenated_shortcuts_have_ranges_of_their_own():
    unet = networks.unconditional()
    splits = backbone_of(unet).shortcut_splits
    layers = networks.plan(unet, "w4a8", Grids(split_shortcuts=True)).layers
    assert splits and {path: layer.splits for path, layer in layers.items() if layer.splits} == splits


@torch.no_grad()
def test_groups_and_dynamic_ranges_are_those_of_the_network():
    grids = Grids(weight_group=5, dynamic_activations=True)
    plan = networks.plan(networks.unconditional(), "w4a8", grids)
    assert all(part.dynamic for part in (*plan.layers.values(), *plan.attentions.values()))
    unet, _, _, report = networks.quantized((grids, WeightRanges("minmax"), RoundToNearest()))
    for path, layer in quantized_layers(unet).items():
        sizes = group_sizes(layer.weight.shape[1], 5)
        assert plan.layers[path].splits == sizes and layer.weight_scale.shape == (len(layer.weight), len(sizes)), path
        assert isinstance(layer.input_quantizer, DynamicQuantize)
    assert not activation_quantizers(unet), "nothing is calibrated"
    assert list(report.seconds) == ["grids", "weight ranges", "round to nearest"]


def test_symmetric_grids_have_no_zero_point():
    grids = Grids(symmetric_activations=True)
    plan = networks.plan(networks.unconditional(), "w4a8", grids)
    assert all(part.symmetric for part in (*plan.layers.values(), *plan.attentions.values()))
    unet, *_ = networks.quantized((grids, *networks.recipe()[1:]))
    for path, quantizer in activation_quantizers(unet).items():
        assert quantizer.symmetric != path.endswith("probabilities"), path
        assert not quantizer.zero_point.any(), path
