"""Widths by the speed of latents, against sequences and tables worked by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.tfmq import networks
from tfmq.checkpoint import load_quantized, save_quantized
from tfmq.network.backbone import evaluate
from tfmq.network.calibration import CalibrationSet
from tfmq.network.sampling import SamplingSettings
from tfmq.passes.speed_bits import (
    SpeedBits,
    affordable_rows,
    average_width,
    bit_demands,
    in_other_bits,
    latent_speeds,
    looked_up,
    speed_changes,
)
from tfmq.plan import activation_quantizers, quantized_layers

RECIPE = networks.recipe(scales="temporal", weight_range="minmax")
ONCE = torch.ones(6, dtype=torch.int64)


def moving(*distances: float) -> CalibrationSet:
    """A pool of two images whose latents move by these distances, of latents of norm 1, 2 and so on."""
    direction = torch.tensor([0.6, 0.8, 0.0]).view(1, 3, 1, 1)
    positions = torch.tensor([1.0, *distances]).cumsum(0)
    latents = positions.view(-1, 1, 1, 1, 1) * direction * torch.tensor([1.0, -5.0]).view(2, 1, 1, 1)
    steps = len(distances)
    alphas = torch.linspace(0.1, 1, steps + 1, dtype=torch.float64)
    noise = torch.zeros_like(latents[:-1])
    return CalibrationSet(
        latents[:-1], torch.arange(steps).flip(0), noise, latents[-1], alphas, SamplingSettings(steps)
    )


def test_speed_and_change_by_hand():
    """From 1 to 2 to 4 to 5 to 5: the latents move by 1, 1, 1/4 and 0 of themselves."""
    speeds = latent_speeds(moving(1.0, 2.0, 1.0, 0.0))
    torch.testing.assert_close(speeds, torch.tensor([1.0, 1.0, 0.25, 0.0], dtype=torch.float64), atol=1e-6, rtol=0)
    changes = speed_changes(speeds)
    torch.testing.assert_close(changes, torch.tensor([0.0, 0.0, 0.75, 0.25], dtype=torch.float64), atol=1e-6, rtol=0)
    slow, fast = (bit_demands(speeds, changes, 0.25, direction) for direction in (True, False))
    for found, expected in ((slow, [0.0, 0.0, 0.8125, 0.75 + 1 / 12]), (fast, [0.75, 0.75, 0.4375, 1 / 12])):
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)
    still = torch.zeros(3, dtype=torch.float64)
    assert bit_demands(still, still, 0.25, True).tolist() == [0.75] * 3


@pytest.mark.parametrize(
    ("margin", "expected"),
    [
        # Thresholds 0.3 and 0.6. Without a margin each row is the number of thresholds below the demand.
        (0.0, [0, 1, 0, 1, 2, 1, 2, 0, 0]),
        # With 0.1 the row rises above 0.4 and 0.7 only, and falls below 0.5 and 0.2 only: 0.35 and 0.25 change nothing,
        # 0.45 rises to 1, 0.72 to 2, 0.55 stays there, 0.61 too, 0.1 falls to 0 over both, and 0.29 stays.
        (0.1, [0, 0, 0, 1, 2, 2, 2, 0, 0]),
        # With 0.3 it rises above 0.6 and 0.9, and falls below 0.3 and 0: 0.72 rises to 1, and 0.1 does not fall to 0.
        (0.3, [0, 0, 0, 0, 1, 1, 1, 1, 1]),
    ],
)
def test_hysteresis_follows_a_sequence_worked_by_hand(margin, expected):
    demands = torch.tensor([0.2, 0.35, 0.25, 0.45, 0.72, 0.55, 0.61, 0.1, 0.29])
    found = looked_up(demands, [0.3, 0.6], margin).tolist()
    assert found == expected


def test_the_first_step_has_no_past():
    assert looked_up(torch.tensor([0.65, 0.65]), [0.3, 0.6], 0.1).tolist() == [2, 2]
    assert looked_up(torch.tensor([0.5]), [], 0.1).tolist() == [0]


def test_thresholds_rise_until_the_mean_is_affordable():
    demands = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert affordable_rows(demands, [4, 6, 8], 0.0, 6.0, ONCE).tolist() == [0, 0, 1, 1, 2, 2]
    # A mean of 6 or more needs one step less in the last row: the thresholds 0.3 and 0.5 have 4, 4, 4, 6, 6, 8.
    assert affordable_rows(demands, [4, 6, 8], 0.0, 5.9, ONCE).tolist() == [0, 0, 0, 1, 1, 2]
    # Where the last step counts twice, the mean of the first table is 44 / 7.
    visits = torch.tensor([1, 1, 1, 1, 1, 2])
    assert affordable_rows(demands, [4, 6, 8], 0.0, 6.0, visits).tolist() == [0, 0, 0, 1, 1, 2]
    assert affordable_rows(demands, [4, 6, 8], 0.0, 4.0, ONCE).tolist() == [0] * 6
    assert average_width(torch.tensor([4, 8]), torch.tensor([3, 1])) == 5


@pytest.mark.parametrize("margin", [0.0, 0.05, 0.2])
def test_the_mean_is_never_above_what_was_asked(margin):
    generator = networks.generator()
    for _ in range(50):
        demands = torch.rand(7, generator=generator)
        rows = affordable_rows(demands, [6, 8, 10], margin, 8.0, torch.ones(7, dtype=torch.int64))
        assert sum([6, 8, 10][row] for row in rows.tolist()) / 7 <= 8


def test_a_range_stays_in_other_bits():
    scale, zero_point = torch.tensor([0.1]), torch.tensor([100.0])
    scales, points = in_other_bits(scale, zero_point, 8, torch.tensor([4, 8, 10]))
    # The range is -10 to 15.5; in 15, 255 and 1,023 parts.
    torch.testing.assert_close(scales, torch.tensor([25.5 / 15, 0.1, 25.5 / 1023]))
    assert points.tolist() == [round(100 * 15 / 255), 100, round(100 * 1023 / 255)]
    of_steps, _ = in_other_bits(torch.tensor([0.1, 0.2]), torch.zeros(2), 8, torch.tensor([4, 8]))
    torch.testing.assert_close(of_steps, torch.tensor([25.5 / 15, 0.2]))


@pytest.mark.parametrize("kind", ["unconditional", "text"])
@pytest.mark.parametrize("fast", ["fewer", "more"])
def test_a_network_gets_the_widths_that_are_reported(kind, fast, tmp_path):
    build, pool = networks.KINDS[kind].build, networks.KINDS[kind].pool(networks.KINDS[kind].build())
    before, *_ = networks.quantized(RECIPE, "w4a8", build, pool)
    network, _, _, report = networks.quantized((*RECIPE, SpeedBits(change_weight=0.0, fast=fast)), "w4a8", build, pool)
    details = report.details
    bits = details["activation_bits"]
    timesteps = pool.timesteps.tolist()
    counted = sum(bits[str(step)] for step in timesteps) / len(timesteps)
    assert details["average_activation_bits"] == pytest.approx(counted) and counted <= 8
    assert set(bits.values()) <= {6, 8, 10} and len(set(bits.values())) > 1
    assert len(details["speeds"]) == len(details["demands"]) == len(timesteps)
    speeds = details["speeds"]
    if kind == "unconditional":  # one visit each, so that order can be told
        order = sorted(range(len(speeds)), key=speeds.__getitem__)
        slowest, fastest = (bits[str(timesteps[order[place]])] for place in (0, -1))
        assert slowest >= fastest if fast == "fewer" else slowest <= fastest
    wanted = [bits[str(step)] for step in network.step_tracker.steps.tolist()]
    for path, quantizer in activation_quantizers(network).items():
        boundary = path.startswith(("conv_in", "conv_out"))
        assert quantizer.step_bits.tolist() == ([max(8, width) for width in wanted] if boundary else wanted), path
        given = activation_quantizers(before)[path]
        length = given.scale * 255
        torch.testing.assert_close(quantizer.scale * (2.0**quantizer.step_bits - 1), length.expand(len(wanted)))
    for path, layer in quantized_layers(before).items():
        assert torch.equal(layer.codes, network.get_submodule(path).codes)
    save_quantized(network, tmp_path / "q.safetensors", {})
    loaded = load_quantized(tmp_path / "q.safetensors")
    context = networks.KINDS[kind].conditioning(2)
    context = None if context is None else context.context
    with torch.no_grad():
        for step in pool.timesteps[[0, -1]]:
            expected = evaluate(network, networks.noise(2), step, context)
            assert torch.equal(evaluate(loaded, networks.noise(2), step, context), expected)


def test_one_width_changes_nothing():
    before, _, pool, _ = networks.quantized(RECIPE, "w4a8")
    network, *_ = networks.quantized((*RECIPE, SpeedBits(offsets=(0,))), "w4a8", recorded=pool)
    with torch.no_grad():
        found, expected = (evaluate(each, networks.noise(2), torch.tensor(401)) for each in (network, before))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_what_makes_no_table_is_refused():
    for offsets in ((), (2, 0), (0, 0), (1, 2)):
        with pytest.raises(ValueError, match="offsets is"):
            SpeedBits(offsets)
    with pytest.raises(ValueError, match="margin"):
        SpeedBits(margin=2.0)
    with pytest.raises(ValueError, match="slower"):
        SpeedBits(fast="slower")
    with pytest.raises(ValueError, match="give 3-bit activations 1 bits: begin at -1"):
        networks.quantized((*RECIPE, SpeedBits()), "w4a3")
    with pytest.raises(ValueError, match="before the pass speed bits"):
        networks.quantized((SpeedBits(), *RECIPE), "w4a8")
    *_, report = networks.quantized((*RECIPE, replace(SpeedBits(), margin=0.0)), "w4a32")
    assert report.details == {}
