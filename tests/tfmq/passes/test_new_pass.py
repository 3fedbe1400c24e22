"""A pass that somebody writes in a file of their own, inside a recipe."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from tests.tfmq import networks
from tests.tfmq.test_workspace import Memory, counted
from tfmq.cost import Shapes, plan_cost
from tfmq.network.calibration import CalibrationRows, CalibrationSet, Draw, Spaced
from tfmq.passes import Cost, Pass
from tfmq.passes.reconstruction import RoundingConfig
from tfmq.plan import quantized_layers
from tfmq.precision import Precision
from tfmq.quantization import quantize_
from tfmq.session import Session, Spent
from tfmq.settings import check_positive

W4A8 = Precision.parse("w4a8")


@dataclass(frozen=True)
class ClipWeights(Pass):
    """Clip each weight to so many of its standard deviations around 0."""

    deviations: float = 3.0

    sees_activations = False

    def __post_init__(self) -> None:
        check_positive(self, "deviations")

    def run(self, session: Session, rows: None) -> None:
        clipped = {}
        for path, layer in quantized_layers(session.network).items():
            most = self.deviations * layer.weight.std().item()
            clipped[path] = (layer.weight.abs() > most).sum().item()
            layer.weight = nn.Parameter(layer.weight.clamp(-most, most), requires_grad=False)
        session.report.details |= {"clipped": clipped}


@dataclass(frozen=True)
class MeasureError(Pass[CalibrationRows]):
    """Tell how far the quantised network is from full precision on some rows."""

    data: Draw = Spaced(2, 3)

    def draw(self, pool: CalibrationSet, generator: torch.Generator) -> CalibrationRows:
        return self.data(pool, generator)

    @torch.no_grad()
    def run(self, session: Session, rows: CalibrationRows) -> None:
        found, target = (unet(rows.latents, rows.timesteps).sample for unet in (session.network, session.full))
        session.report.details |= {"error": ((found - target).norm() / target.norm()).item()}
        session.count_evaluations(2 * len(rows))

    def cost(self, shapes: Shapes, rows: CalibrationRows) -> Cost:
        return Cost(2 * len(rows))


def test_it_runs_in_its_place_and_is_reported_and_planned_by_its_name():
    grids, *others = networks.recipe()
    recipe = (grids, ClipWeights(1.5), *others, MeasureError())
    unet, full, pool, report = networks.quantized(recipe)
    for path, layer in quantized_layers(unet).items():
        deviation = full.get_submodule(path).weight.std()
        assert layer.weight.abs().max() <= 1.5 * deviation + layer.weight_scale.max(), path
    plain = networks.quantized((grids, *others))[0]
    assert plain.conv_in.weight.abs().max() > unet.conv_in.weight.abs().max()
    assert report.details["clipped"].keys() == quantized_layers(unet).keys()
    assert all(count > 0 for count in report.details["clipped"].values()) and report.details["error"] > 0
    names = ["grids", "clip weights", *(step.name for step in others), "measure error"]
    assert [spent.name for spent in report.passes] == names
    assert replace(report.passes[1], seconds=0) == Spent("clip weights")
    assert replace(report.passes[-1], seconds=0) == Spent("measure error", unet_evaluations=12)
    planned = plan_cost(full.to("meta"), W4A8, recipe, pool)
    assert [name for name, _ in planned.costs] == names
    assert planned.costs[1] == ("clip weights", Cost()) and planned.costs[-1] == ("measure error", Cost(12))
    assert planned.cost.unet_evaluations == report.cost.unet_evaluations == 20 + 12
    assert planned.held > planned.networks


def test_its_settings_decide_what_later_passes_learn(monkeypatch):
    """It stands in a file, so a workspace can keep what is learned after it."""
    grids, *others = networks.recipe(rounding=RoundingConfig(iterations=1, batch=4))
    unet = networks.unconditional()
    pool = networks.pool(unet)
    kept = Memory()
    learned = counted(monkeypatch)
    counts = []
    for clip in (ClipWeights(), ClipWeights(3.0), ClipWeights(2.0)):
        recipe = (grids, clip, *others)
        quantize_(networks.unconditional(), W4A8, recipe, pool, networks.generator(), workspace=kept)
        counts.append(learned["learn_rounding"])
    assert counts[0] == counts[1] == counts[2] / 2 > 0


def test_its_settings_are_checked_where_they_are_written():
    with pytest.raises(ValueError, match="deviations is 0: it must be a finite number above 0"):
        ClipWeights(0)
