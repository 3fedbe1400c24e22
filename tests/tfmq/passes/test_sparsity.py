"""Counting zeros, against loops over a hand-made network, and the summary against a table worked by hand."""

from __future__ import annotations

import pytest
import torch

from tests.tfmq import networks
from tfmq.network.backbone import evaluate
from tfmq.passes.block_formats import BlockFormats
from tfmq.passes.rectification import Rectification
from tfmq.passes.sparsity import MeasureSparsity, count_zeros, summary
from tfmq.passes.weight_ranges import RoundToNearest, WeightRanges

RELU = Rectification(0, data=networks.ALL_ROWS)
ROUNDING = (WeightRanges("minmax"), RoundToNearest())
MEASURE = MeasureSparsity(0.3, networks.ALL_ROWS, batch=3)


def test_the_summary_of_two_layers_and_two_steps_by_hand():
    """Layer a makes 300 of 1,000 multiplications, b 100; both have two channels, and both are seen at steps 1 and 9."""
    zeros = {"a": torch.tensor([[0.5, 0.2], [0.9, 0.3]]), "b": torch.tensor([[0.0, 1.0], [0.0, 0.1]])}
    found = summary(zeros, {"a": 300, "b": 100, "c": 600}, 0.3, torch.tensor([1, 9]))
    # Sparse at step 1: a's first and b's second; at step 9 both of a. So two of four switch.
    expected = {
        "rectified_operations": 0.4,
        "sparse_channels": 0.5,
        "switching_channels": 0.5,
        "zeros": ((300 * 0.35 + 100 * 0.5) / 400 + (300 * 0.6 + 100 * 0.05) / 400) / 2,
        "saved_operations": (300 * (0.5 + 0.9 + 0.3) / 4 + 100 * 1.0 / 4) / 1000,
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-6), name
    assert found["zeros_by_step"] == pytest.approx({"1": 0.3875, "9": 0.4625})
    assert found["sparse_channels_by_step"] == pytest.approx({"1": 0.5, "9": 0.5})
    assert summary({}, {"c": 10}, 0.3, torch.tensor([1])) == {"rectified_operations": 0.0}


@torch.no_grad()
def test_zeros_are_those_of_the_quantised_inputs():
    recipe = (RELU, BlockFormats(wide_ends=0), *ROUNDING)
    network, _, pool, _ = networks.quantized(recipe, "w4a4")
    path, other = "down_blocks.0.resnets.0.conv1", "conv_out"
    rows = networks.ALL_ROWS(pool, networks.generator())
    zeros, operations = count_zeros(network, [path, other], rows, 4)
    timesteps = rows.timesteps.unique().tolist()
    assert zeros[path].shape == (5, 16) and zeros[other].shape == (5, 16)
    seen = []
    layer = network.get_submodule(path)
    layer.register_forward_pre_hook(lambda layer, args: seen.append(layer.input_quantizer(args[0])))
    step = timesteps[2]
    evaluate(network, rows.latents[rows.timesteps == step], torch.tensor(step))
    (quantized,) = seen
    for channel in range(16):
        values = quantized[:, channel].flatten().tolist()
        assert zeros[path][2, channel].item() == pytest.approx(sum(value == 0 for value in values) / len(values))
    # A coarse grid rounds small values to 0 besides those that ReLU has cut off.
    assert 0.3 < zeros[path].mean() < 0.95
    assert operations[path] == 8 * 8 * 16 * 16 * 9 and operations["time_embedding.linear_1"] == 16 * 64
    assert set(operations) == {name for name, m in network.named_modules() if hasattr(m, "input_quantizer")}
    assert not any(module._forward_hooks for module in network.modules())


def test_the_pass_reports_numbers_and_leaves_the_network_alone():
    network, _, pool, report = networks.quantized((RELU, BlockFormats(), *ROUNDING, MEASURE), "w4a4")
    plain, *_ = networks.quantized((RELU, BlockFormats(), *ROUNDING), "w4a4")
    for name, tensor in plain.state_dict().items():
        assert torch.equal(network.state_dict()[name], tensor)
    details = report.details
    assert (
        report.passes[-1].unet_evaluations == 20 == MEASURE.cost(None, networks.ALL_ROWS(pool, None)).unet_evaluations
    )
    for name in ("zeros", "sparse_channels", "switching_channels", "rectified_operations", "saved_operations"):
        assert 0 <= details[name] <= 1
    assert details["saved_operations"] <= details["zeros"] * details["rectified_operations"] + 1e-9
    assert list(details["zeros_by_step"]) == [str(step) for step in sorted(pool.timesteps.tolist())]


def test_without_relu_there_is_nothing_to_count():
    *_, report = networks.quantized((BlockFormats(), *ROUNDING, MEASURE), "w4a4")
    assert report.details == {"rectified_operations": 0.0}


@pytest.mark.parametrize("field", [{"threshold": 1.5}, {"batch": 0}])
def test_settings_are_checked(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        MeasureSparsity(**field)
