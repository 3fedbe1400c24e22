"""TCAQ-DM and its parts: which passes they make, in which order, and what their checkpoints say."""

from __future__ import annotations

import dataclasses
import json

import pytest
from safetensors import safe_open

from baselines import _tcaq, prev, tcaq_daq, tcaq_dm, tcaq_par, tcaq_tcr
from tests.tfmq import networks
from tfmq.checkpoint import save_quantized
from tfmq.passes.adaptive_probabilities import AdaptiveProbabilities
from tfmq.passes.channel_scales import ScaleChannels
from tfmq.passes.recalibration import Recalibration
from tfmq.passes.reconstruction import RoundingConfig, StepSizeConfig
from tfmq.precision import Precision

BASE = ["weight ranges", "block reconstruction", "activation ranges"]
PARTS = {tcaq_tcr: "scale channels", tcaq_daq: "adaptive probabilities", tcaq_par: "recalibration"}
FEW = {"steps": 5, "images": 2, "range_images": 2, "iterations": 2}


def names(recipe):
    return [step.name for step in recipe]


@pytest.mark.parametrize("part", PARTS, ids=PARTS.values())
def test_a_row_of_a_part_is_the_base_and_that_part(part):
    recipe = part.Config().recipe()
    assert [name for name in names(recipe) if name != PARTS[part]] == BASE == names(prev.METHOD.config().recipe())
    assert tuple(step for step in recipe if step.name != PARTS[part]) == prev.METHOD.config().recipe()


def test_all_three_parts_stand_where_they_have_to():
    assert names(tcaq_dm.Config().recipe()) == [
        "scale channels",
        "weight ranges",
        "block reconstruction",
        "adaptive probabilities",
        "activation ranges",
        "recalibration",
    ]
    assert names(_tcaq.Config().recipe()) == BASE


def test_settings_arrive_at_the_passes():
    config = tcaq_dm.Config(
        images=7, range_images=9, batch=5, groups=3, strength=0.5, rounds=2, round_activation_iterations=0
    )
    by_type = {type(step): step for step in config.recipe()}
    scaling, adapting, rounds = (by_type[each] for each in (ScaleChannels, AdaptiveProbabilities, Recalibration))
    assert (scaling.groups, scaling.strength, scaling.data.images, scaling.data.steps) == (3, 0.5, 9, None)
    assert (adapting.data.images, adapting.per_step) == (9, True)
    assert rounds.rounding == RoundingConfig(5_000, 5, 1e-3) and rounds.step_sizes is None
    assert (rounds.rounds, rounds.data.images) == (2, 7)
    learning = dataclasses.replace(config, round_activation_iterations=4).recipe()[-1].step_sizes
    assert learning == StepSizeConfig(4, 5, 4e-4)
    with pytest.raises(ValueError, match="unknown scaled_layers 'convolution': did you mean 'convolutions'"):
        tcaq_dm.Config(scaled_layers="convolution")


def test_no_kernel_is_promised_where_the_grids_have_none():
    for module in (tcaq_dm, tcaq_tcr, tcaq_daq):
        assert module.METHOD.lacks("deployable") == "integer kernels do not execute its grids"
    assert not tcaq_par.METHOD.lacks("deployable")
    assert not any(tcaq_dm.METHOD.objection(Precision.parse(each)) for each in ("w8a8", "w6a6", "w4a8", "w4a4"))


def test_files_of_other_methods_do_not_name_its_parts(tmp_path):
    plans = {}
    for module in (prev, tcaq_dm):
        config = module.METHOD.config(**FEW)
        if module is tcaq_dm:
            config = dataclasses.replace(config, rounds=1, round_iterations=2, round_activation_iterations=2)
        unet, *_ = networks.quantized(config.recipe())
        save_quantized(unet, tmp_path / "q.safetensors", {})
        with safe_open(tmp_path / "q.safetensors", "pt") as file:
            plan = json.loads(file.metadata()["plan"])
        plans[module] = [{*each} for each in (*plan["layers"].values(), *plan["attentions"].values())]
    assert not any(each & {"channel_scales", "adaptive"} for each in plans[prev])
    assert sum("channel_scales" in each for each in plans[tcaq_dm]) > 5
    assert any("adaptive" in each for each in plans[tcaq_dm])
