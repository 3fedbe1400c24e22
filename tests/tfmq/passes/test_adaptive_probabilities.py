"""Which attentions of a network get a logarithmic grid, and what becomes of it."""

from __future__ import annotations

import pytest
import torch

from tests.tfmq import networks
from tfmq.checkpoint import load_quantized, save_quantized
from tfmq.execution import executing
from tfmq.modules.adaptive import AdaptiveQuantize
from tfmq.network.backbone import backbone_of
from tfmq.passes.activation_ranges import ActivationRanges
from tfmq.passes.adaptive_probabilities import AdaptiveProbabilities
from tfmq.passes.deployable import deployable
from tfmq.passes.grids import Grids
from tfmq.passes.reconstruction import StepSizeConfig
from tfmq.passes.step_sizes import StepSizes
from tfmq.passes.weight_ranges import RoundToNearest, WeightRanges
from tfmq.plan import activation_quantizers
from tfmq.state import plan_of

SHARPNESS = 3.5


def sharp():
    """A network whose attention in the middle is sharp, and flat elsewhere."""
    unet = networks.unconditional()
    attention = unet.mid_block.attentions[0]
    for projection in (attention.to_q, attention.to_k):
        projection.weight.data *= SHARPNESS
    return unet


def passes(per_step=True, step_sizes=False):
    found = [WeightRanges("minmax"), RoundToNearest()]
    found.append(AdaptiveProbabilities(networks.ALL_ROWS, samples=500, per_step=per_step, batch=4))
    found.append(ActivationRanges(networks.ALL_ROWS))
    if step_sizes:
        found.append(StepSizes(StepSizeConfig(2, 4), networks.ALL_ROWS))
    return tuple(found)


def adaptive(unet):
    return {
        p.split(".processor")[0]: q for p, q in activation_quantizers(unet).items() if isinstance(q, AdaptiveQuantize)
    }


@pytest.mark.parametrize("per_step", [True, False])
def test_sharp_attention_alone_gets_a_logarithmic_grid(per_step):
    unet, full, _, report = networks.quantized(passes(per_step), "w8a4", sharp)
    found = adaptive(unet)
    assert set(found) == set(backbone_of(full).attentions)
    for path, quantizer in found.items():
        assert len(quantizer.logarithmic) == len(quantizer.scale) == (5 if per_step else 1)
        assert quantizer.logarithmic.all() if path.startswith("mid_block") else not quantizer.logarithmic.any(), path
    shares = report.details["logarithmic_steps"]
    assert {path.split(".processor")[0]: share for path, share in shares.items()} == {
        path: float(path.startswith("mid_block")) for path in found
    }
    assert all(quantizer.enabled for quantizer in activation_quantizers(unet).values())
    assert report.passes[2].unet_evaluations == 20


@pytest.mark.parametrize("per_step", [True, False])
def test_a_checkpoint_holds_the_grids(per_step, tmp_path):
    unet, *_ = networks.quantized(passes(per_step), "w8a4", sharp)
    save_quantized(unet, tmp_path / "q.safetensors", {})
    loaded = load_quantized(tmp_path / "q.safetensors")
    assert plan_of(loaded) == plan_of(unet)
    assert torch.equal(networks.KINDS["unconditional"].draw(loaded), networks.KINDS["unconditional"].draw(unet))
    grids = [quantizer.logarithmic.tolist() for quantizer in adaptive(loaded).values()]
    assert grids == [quantizer.logarithmic.tolist() for quantizer in adaptive(unet).values()] and any(map(sum, grids))


def test_its_step_sizes_learn_where_they_are_shared():
    before, after = (
        adaptive(networks.quantized(passes(False, step_sizes), "w8a4", sharp)[0])["mid_block.attentions.0"].scale
        for step_sizes in (False, True)
    )
    assert before.item() != after.item()


def test_dynamic_attention_and_attention_in_full_precision_stay_as_they_are():
    unet, *_ = networks.quantized((Grids(dynamic_activations=True), *passes()), "w8a8")
    assert not adaptive(unet)
    unet, *_, report = networks.quantized(passes(), "w8a32")
    assert not adaptive(unet) and report.cost.unet_evaluations == 0


def test_integer_kernels_refuse_it_by_name():
    unet, *_ = networks.quantized(passes(), "w8a8", sharp)
    with pytest.raises(ValueError, match="processor cannot be executed: the grid of its probabilities may be logarith"):
        executing(unet)
    with pytest.raises(ValueError, match="have logarithmic grids, which integer kernels do not execute"):
        networks.quantized(deployable(passes()), "w8a8")


def test_settings_are_checked():
    with pytest.raises(ValueError, match="significance is 2"):
        AdaptiveProbabilities(significance=2)
    with pytest.raises(ValueError, match="samples is 0"):
        AdaptiveProbabilities(samples=0)
