"""Inputs besides latents, time step and context: what is known is calibrated, what is not is refused by name."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from tests.tfmq import networks, pipelines
from tfmq.checkpoint import load_quantized, save_quantized
from tfmq.cost import plan_cost
from tfmq.network.backbone import NO_INPUTS, backbone_of, evaluate
from tfmq.network.calibration import CalibrationSet, collect_calibration
from tfmq.network.conditioning import Conditioning, Control
from tfmq.network.offload import BlockStream, Place
from tfmq.network.rows import CalibrationRows
from tfmq.network.sampling import SamplingSettings, predict_noise
from tfmq.passes.correction import quantized_noise
from tfmq.passes.reconstruction import RoundingConfig, StepSizeConfig
from tfmq.passes.temporal_cache import TemporalCache
from tfmq.passes.training import QuantizationAwareTraining, TrainingConfig, noised
from tfmq.plan import insert_quantizers
from tfmq.precision import Precision
from tfmq.quantization import quantize_

ROWS, STEPS = 4, torch.tensor([901, 601, 601, 1])
FEW, FEW_SIZES = RoundingConfig(iterations=3, batch=3), StepSizeConfig(iterations=3, batch=3)
LCM, INPAINTING = {"time_cond_proj_dim": 8}, {"in_channels": 9}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def control_residuals(rows: int = ROWS) -> dict[str, torch.Tensor]:
    shapes = [(16, 8, 8), (16, 8, 8), (16, 4, 4), (32, 4, 4)]
    found = {f"down_block_additional_residuals.{i}": draw(rows, *s, seed=i) for i, s in enumerate(shapes)}
    return found | {"mid_block_additional_residual": draw(rows, 32, 4, 4, seed=9)}


def adapter_residuals(*shapes: tuple[int, int, int], rows: int = ROWS) -> dict[str, torch.Tensor]:
    return {f"down_intrablock_additional_residuals.{i}": draw(rows, *s, seed=20 + i) for i, s in enumerate(shapes)}


def sizes(rows: int = ROWS) -> dict[str, torch.Tensor]:
    return {"text_embeds": draw(rows, 6, seed=3), "time_ids": 32 * torch.rand(rows, 6, generator=networks.generator())}


ADAPTED = ((16, 8, 8), (32, 4, 4))
# Settings of a UNet, and the further inputs of four rows.
KINDS: dict[str, tuple[dict[str, object], dict[str, torch.Tensor]]] = {
    "sdxl": (pipelines.XL, sizes()),
    "lcm": (LCM, {"timestep_cond": draw(ROWS, 8, seed=4)}),
    "lcm of sdxl": ({**pipelines.XL, **LCM}, {**sizes(), "timestep_cond": draw(ROWS, 8, seed=4)}),
    "inpainting": (INPAINTING, {"channels": draw(ROWS, 5, 8, 8, seed=5)}),
    "inpainting with sdxl": ({**pipelines.XL, **INPAINTING}, {**sizes(), "channels": draw(ROWS, 5, 8, 8, seed=5)}),
    "controlnet": ({}, control_residuals()),
    "adapter": ({}, adapter_residuals(*ADAPTED)),
    "adapter with a middle": ({}, adapter_residuals(*ADAPTED, (32, 4, 4))),
    "adapter with another middle": ({}, adapter_residuals(*ADAPTED, (32, 2, 2))),
    "all with sdxl": (
        pipelines.XL,
        {**sizes(), **control_residuals(), **adapter_residuals(*ADAPTED)},
    ),
}
ADAPTER_BEHIND = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}


def arguments(inputs: Mapping[str, torch.Tensor]) -> dict[str, object]:
    """Further inputs as diffusers' forward takes them."""

    def every(name: str) -> list[torch.Tensor] | None:
        return [value for key, value in sorted(inputs.items()) if key.startswith(f"{name}.")] or None

    return {
        "timestep_cond": inputs.get("timestep_cond"),
        "added_cond_kwargs": {name: inputs[name] for name in ("text_embeds", "time_ids") if name in inputs} or None,
        "down_block_additional_residuals": every("down_block_additional_residuals"),
        "mid_block_additional_residual": inputs.get("mid_block_additional_residual"),
        "down_intrablock_additional_residuals": every("down_intrablock_additional_residuals"),
    }


def example(kind: str) -> tuple[UNet2DConditionModel, CalibrationRows]:
    settings, inputs = KINDS[kind]
    unet = pipelines.unet(**settings)
    context = draw(ROWS, 5, unet.config.cross_attention_dim, seed=1)
    return unet, CalibrationRows(draw(ROWS, 4, 8, 8, seed=2), STEPS, context, inputs)


def called(unet: UNet2DConditionModel, rows: CalibrationRows) -> torch.Tensor:
    """What diffusers' forward makes of the rows."""
    extra = [rows.inputs["channels"]] if "channels" in rows.inputs else []
    return unet(torch.cat([rows.latents, *extra], 1), rows.timesteps, rows.context, **arguments(rows.inputs)).sample


def streamed(unet: UNet2DConditionModel, rows: CalibrationRows) -> torch.Tensor:
    """The same, block by block."""
    stream = BlockStream(unet, backbone_of(unet), rows, 3, Place(unet.device))
    for block in stream.backbone.blocks:
        stream.advance(block, stream.outputs(block, stream.inputs(block)))
    return stream.hidden


def constant_pool(rows: CalibrationRows) -> CalibrationSet:
    """A pool of an image for each row, over the rows' steps, whose inputs are theirs."""
    base = networks.pool_of(rows)
    residual = {name: value for name, value in rows.inputs.items() if "additional_residual" in name}
    fixed = {name: value[:1] for name, value in rows.inputs.items() if name not in residual}
    return CalibrationSet(
        **base.tensors,
        settings=base.settings,
        inputs=fixed,
        residuals={name: value[:1].expand(base.steps, 1, *value.shape[1:]) for name, value in residual.items()},
    )


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_evaluation_and_blocks_are_the_forward_pass(kind):
    unet, rows = example(kind)
    expected = called(unet, rows)
    plain = CalibrationRows(rows.latents, rows.timesteps, rows.context)
    for name in rows.inputs:  # each matters, but a middle of another shape, which diffusers leaves out
        if name == "channels" or "text_embeds" in rows.inputs or name.endswith("residuals.2"):
            continue
        assert not torch.allclose(evaluate(unet, plain.latents, plain.timesteps, plain.context), expected)
    found = evaluate(unet, rows.latents, rows.timesteps, rows.context, rows.inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(streamed(unet, rows), expected)


@pytest.mark.parametrize("settings", [ADAPTER_BEHIND, {**ADAPTER_BEHIND, "layers_per_block": 2}])
@torch.no_grad()
def test_an_adapter_adds_behind_a_block_without_cross_attention(settings):
    """There diffusers adds in place to what downsampling puts out, which is a skip connection too."""
    unet = pipelines.unet(**settings)
    inputs = adapter_residuals((16, 4, 4), (32, 4, 4))
    rows = CalibrationRows(draw(ROWS, 4, 8, 8, seed=2), STEPS, draw(ROWS, 5, 8, seed=1), inputs)
    torch.testing.assert_close(streamed(unet, rows), called(unet, rows))


@pytest.mark.parametrize("kind", ["lcm of sdxl", "inpainting", "adapter", "all with sdxl"])
def test_every_pass_learns_on_them_and_the_file_keeps_the_network(kind, tmp_path):
    unet, rows = example(kind)
    full, pool = copy.deepcopy(unet), constant_pool(rows)
    data = networks.drawing(rows)
    recipe = networks.recipe(
        rounding=FEW,
        temporal=FEW,
        scales="temporal",
        step_sizes=FEW_SIZES,
        weight_range="minmax",
        data=data,
        batch=3,
    )
    asked = kind == "all with sdxl"  # for memory, which takes seconds
    planned = plan_cost(copy.deepcopy(unet).to("meta"), Precision.parse("w8a8"), recipe, pool, memory=asked)
    report = quantize_(unet, Precision.parse("w8a8"), recipe, pool, networks.generator())
    assert not asked or planned.held > 0
    assert planned.cost.optimizer_steps == report.cost.optimizer_steps
    assert planned.cost.unet_evaluations == report.cost.unet_evaluations
    with torch.no_grad():
        exact, found = called(full, rows), called(unet, rows)
        assert (found - exact).norm() < 0.1 * exact.norm()
        save_quantized(unet, tmp_path / "q.safetensors", {})
        assert torch.equal(called(load_quantized(tmp_path / "q.safetensors"), rows), found)


def outputs(unet: torch.nn.Module, rows: CalibrationRows, paths: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """What the layers at ``paths`` put out in the forward pass."""
    seen: dict[str, torch.Tensor] = {}

    def record(path: str):
        return lambda module, args, output: seen.update({path: output})

    hooks = [unet.get_submodule(path).register_forward_hook(record(path)) for path in paths]
    called(unet, rows)
    for hook in hooks:
        hook.remove()
    return seen


def test_the_temporal_information_block_depends_on_the_time_step_alone():
    """Its features at a step are the same for all conditions; those of other projections are not, in SDXL and LCM."""
    for kind, embedding, projections in (
        ("controlnet", ("linear_1", "linear_2"), 8),
        ("sdxl", ("linear_1",), 1),
        ("lcm", (), 0),
        ("lcm of sdxl", (), 0),
    ):
        unet, rows = example(kind)
        backbone = backbone_of(unet)
        assert backbone.time_embedding == tuple(f"time_embedding.{name}" for name in embedding)
        assert len(backbone.time_projections) == projections
        features = backbone.temporal_features(unet, STEPS)
        seen = outputs(unet, rows, backbone.time_projections)
        for path, expected in zip(backbone.time_projections, features, strict=True):
            torch.testing.assert_close(seen[path], expected)


@pytest.mark.parametrize("where", ["all", "projection", "step"])
def test_sdxl_looks_up_what_the_time_step_alone_decides(where, tmp_path):
    unet, rows = example("sdxl")
    full, pool = copy.deepcopy(unet), constant_pool(rows)
    cache = TemporalCache(where)
    recipe = networks.recipe(data=networks.drawing(rows), weight_range="minmax")
    recipe = (cache, *recipe) if where == "all" else (*recipe, cache)
    quantize_(unet, Precision.parse("w8a8"), recipe, pool, networks.generator())
    with torch.no_grad():
        exact, found = called(full, rows), called(unet, rows)
        assert (found - exact).norm() < 0.1 * exact.norm()
        changed = dict(rows.inputs, text_embeds=-rows.inputs["text_embeds"])
        other = CalibrationRows(rows.latents, rows.timesteps, rows.context, changed)
        effect, kept = called(full, other) - exact, called(unet, other) - found
        assert (kept - effect).norm() < 0.5 * effect.norm(), "conditions still act"
        save_quantized(unet, tmp_path / "q.safetensors", {})
        assert torch.equal(called(load_quantized(tmp_path / "q.safetensors"), rows), found)


@pytest.mark.parametrize("where", ["all", "projection", "step"])
def test_lcm_has_no_features_to_look_up_and_its_condition_acts_quantised(where):
    unet, rows = example("lcm")
    full, pool = copy.deepcopy(unet), constant_pool(rows)
    recipe = networks.recipe(data=networks.drawing(rows), scales="temporal", weight_range="minmax")
    with pytest.raises(ValueError, match="time_cond_proj_dim.*recipe without TemporalCache"):
        quantize_(unet, Precision.parse("w8a8"), (TemporalCache(where), *recipe), pool, networks.generator())
    quantize_(unet, Precision.parse("w8a8"), recipe, pool, networks.generator())
    changed = CalibrationRows(
        rows.latents, rows.timesteps, rows.context, {"timestep_cond": -rows.inputs["timestep_cond"]}
    )
    with torch.no_grad():
        effect = called(full, changed) - called(full, rows)
        kept = called(unet, changed) - called(unet, rows)
    assert effect.norm() > 0 and (kept - effect).norm() < 0.5 * effect.norm()


def conditional_pool(kind: str) -> tuple[UNet2DConditionModel, CalibrationSet, Conditioning]:
    """Sampled with guidance, two images, predicting v."""
    settings, inputs = KINDS[kind]
    unet = pipelines.unet(**settings)
    width = unet.config.cross_attention_dim
    fixed = {name: value[:2] for name, value in inputs.items() if "residual" not in name}
    off = {name: -fixed[name] for name in ("text_embeds",) if name in fixed}
    controls = ()
    if "controlnet" in kind:
        controls = (Control(pipelines.controlnet(), torch.rand(2, 3, 32, 32, generator=networks.generator()), 0.7),)
    conditioning = Conditioning(draw(2, 5, width, seed=1), draw(2, 5, width, seed=6), fixed, off, controls)
    settings = SamplingSettings(3, 0.0, 3.0)
    scheduler = pipelines.ddim()
    return (
        unet,
        collect_calibration(unet, scheduler, draw(2, 4, 8, 8), settings, batch=1, conditioning=conditioning),
        (conditioning),
    )


@pytest.mark.parametrize("kind", ["sdxl", "lcm", "inpainting", "controlnet"])
@torch.no_grad()
def test_a_pool_is_the_same_from_its_tensors_and_its_rows_give_its_predictions(kind):
    unet, pool, conditioning = conditional_pool(kind)
    again = CalibrationSet.of(pool.tensors, pool.settings)
    assert again.tensors.keys() == pool.tensors.keys() and again.settings == pool.settings
    assert all(torch.equal(again.tensors[name], value) for name, value in pool.tensors.items())
    for step in range(pool.steps):
        torch.testing.assert_close(quantized_noise(unet, again, step, 2, 2), pool.noise[step], rtol=1e-4, atol=1e-5)
        timestep = pool.timesteps[step]
        direct = predict_noise(unet, pool.latents[step], timestep, conditioning, 3.0)
        torch.testing.assert_close(direct, pool.noise[step], rtol=1e-4, atol=1e-5)
        rows = pool.rows(torch.tensor([step, step]), torch.tensor([0, 1]))
        predicted = evaluate(unet, rows.latents, rows.timesteps, rows.context, rows.inputs)
        if pool.unconditional is not None:
            on, off = predicted.chunk(2)
            predicted = off + 3.0 * (on - off)
        torch.testing.assert_close(predicted, pool.noise[step], rtol=1e-4, atol=1e-5)
    assert (pool.unconditional is None) == (kind == "lcm"), "an LCM is given the guidance scale, and not guided"


def test_tensors_of_a_plain_pool_are_those_of_before():
    names = ("latents", "timesteps", "noise", "samples", "alphas")
    assert tuple(networks.pool(networks.unconditional()).tensors) == names
    kind = networks.KINDS["text"]
    assert tuple(kind.pool(kind.build(), 2).tensors) == (*names, "context", "unconditional")


@torch.no_grad()
def test_several_controlnets_add_up():
    unet, rows = example("controlnet")
    first, second = pipelines.controlnet(), pipelines.controlnet()
    for parameter in second.parameters():
        parameter.mul_(-1.5)
    images = torch.rand(2, ROWS, 3, 32, 32, generator=networks.generator())
    conditioning = Conditioning(rows.context, controls=(Control(first, images[0]), Control(second, images[1], 0.5)))
    found = predict_noise(unet, rows.latents, STEPS[0], conditioning, 1.0)
    down, middle = None, None
    for network, shown, scale in ((first, images[0], 1.0), (second, images[1], 0.5)):
        parts, last = network(
            rows.latents, STEPS[0], rows.context, controlnet_cond=shown, conditioning_scale=scale, return_dict=False
        )
        down = parts if down is None else [a + b for a, b in zip(down, parts, strict=True)]
        middle = last if middle is None else middle + last
    expected = unet(
        rows.latents,
        STEPS[0],
        rows.context,
        down_block_additional_residuals=down,
        mid_block_additional_residual=middle,
    ).sample
    torch.testing.assert_close(found, expected)


def test_training_drops_conditions_as_guidance_is_trained_and_refuses_a_controlnet():
    _, pool, _ = conditional_pool("sdxl")
    rows, _ = noised(pool, 64, networks.generator())
    dropped = (rows.context == pool.unconditional[:1]).flatten(1).all(1) | (
        rows.context == pool.unconditional[1:]
    ).flatten(1).all(1)
    assert 0 < dropped.sum() < 32
    texts, off = pool.inputs["text_embeds"], pool.unconditional_inputs["text_embeds"]
    for taken, row in zip(dropped, rows.inputs["text_embeds"], strict=True):
        assert any(torch.equal(row, each) for each in (off if taken else texts))
    unet, pool, _ = conditional_pool("controlnet")
    recipe = (QuantizationAwareTraining(TrainingConfig(iterations=1, batch=2)),)
    with pytest.raises(ValueError, match="recorded with a ControlNet"):
        quantize_(unet, Precision.parse("w8a8"), recipe, pool, networks.generator())


def insert(unet: torch.nn.Module) -> torch.nn.Module:
    insert_quantizers(unet, networks.plan(unet, "w8a8"))
    return unet


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"encoder_attention_mask": torch.ones(2, 5)}, "encoder_attention_mask"),
        ({"attention_mask": torch.ones(2, 64)}, "attention_mask"),
        ({"cross_attention_kwargs": {"gligen": {"boxes": torch.ones(1)}}}, "cross_attention_kwargs.gligen"),
        ({"cross_attention_kwargs": {"scale": 0.5}}, "cross_attention_kwargs.scale"),
        ({"class_labels": torch.ones(2)}, "class_labels"),
        ({"timestep_cond": torch.ones(2, 8)}, "timestep_cond"),
        ({"added_cond_kwargs": {"image_embeds": torch.ones(2, 8)}}, "added_cond_kwargs.image_embeds"),
        ({"added_cond_kwargs": {"text_embeds": torch.ones(2, 8)}}, "added_cond_kwargs.text_embeds"),
    ],
)
def test_a_quantised_network_refuses_by_name_what_it_does_not_know(given, name):
    unet = insert(pipelines.unet())
    inputs = draw(2, 4, 8, 8), 1, draw(2, 5, 8)
    unet(*inputs, added_cond_kwargs=None, cross_attention_kwargs={}, encoder_attention_mask=None, return_dict=False)
    with pytest.raises(ValueError, match=rf"UNet2DConditionModel was called with {name}, which it was not calibrated"):
        unet(*inputs, **given)


def test_so_do_the_other_networks_and_arguments_by_position():
    unet = insert(networks.unconditional())
    with pytest.raises(ValueError, match="UNet2DModel was called with class_labels"):
        unet(networks.noise(2), 1, torch.zeros(2))
    conditional = insert(pipelines.unet())
    with pytest.raises(ValueError, match="was called with class_labels"):
        conditional(draw(2, 4, 8, 8), 1, draw(2, 5, 8), torch.zeros(2))
    sdxl = insert(pipelines.unet(**pipelines.XL))
    added = sizes(2)
    sdxl(draw(2, 4, 8, 8), 1, draw(2, 5, 16), added_cond_kwargs=added)
    with pytest.raises(ValueError, match=r"called with added_cond_kwargs\.image_embeds"):
        sdxl(draw(2, 4, 8, 8), 1, draw(2, 5, 16), added_cond_kwargs=added | {"image_embeds": draw(2, 3)})


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"class_embed_type": "identity"}, "class_embed_type 'identity'"),
        ({"class_embed_type": "timestep"}, "class_embed_type 'timestep'"),
        ({"num_class_embeds": 4}, "num_class_embeds 4"),
        ({"addition_embed_type": "text"}, "addition_embed_type 'text'"),
        ({"addition_embed_type": "image", "encoder_hid_dim": 8}, "addition_embed_type 'image'"),
        ({"encoder_hid_dim": 8}, "encoder_hid_dim 8"),
        ({"attention_type": "gated"}, "attention_type 'gated'"),
        ({"dual_cross_attention": True}, "dual cross-attention at"),
        ({"time_embedding_type": "fourier"}, "positional time embedding"),
        (
            {
                "down_block_types": ("SimpleCrossAttnDownBlock2D", "DownBlock2D"),
                "attention_head_dim": 8,
            },
            "SimpleCrossAttnDownBlock2D",
        ),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "attention_head_dim": 8}, "UNetMidBlock2DSimpleCrossAttn"),
    ],
)
def test_a_network_whose_config_needs_what_is_not_known_is_refused_by_name(settings, reason):
    unet = pipelines.unet(**settings)
    with pytest.raises(ValueError, match=reason):
        backbone_of(unet)


def test_features_of_unconditional_unets_and_freeu_are_refused_too():
    shared = {"sample_size": 8, "block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4}
    plain = {"down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D")}
    with pytest.raises(ValueError, match="class_embed_type 'identity'"):
        backbone_of(UNet2DModel(**shared, **plain, class_embed_type="identity"))
    skips = {"down_block_types": ("SkipDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D")}
    with pytest.raises(ValueError, match="SkipDownBlock2D"):
        backbone_of(UNet2DModel(**{**shared, "block_out_channels": (32, 32)}, **skips))
    unet = pipelines.unet()
    unet.enable_freeu(0.9, 0.2, 1.2, 1.4)
    with pytest.raises(ValueError, match="FreeU.*disable_freeu"):
        backbone_of(unet)
    unet.disable_freeu()
    backbone_of(unet)


@pytest.mark.parametrize(
    ("settings", "inputs", "reason"),
    [
        (pipelines.XL, {}, "the pool has no text_embeds"),
        (pipelines.XL, {"text_embeds": draw(ROWS, 6)}, "the pool has no time_ids"),
        (LCM, {}, "the pool has no timestep_cond"),
        (INPAINTING, {}, r"takes \(images, 9, height, width\)"),
        (
            INPAINTING,
            {"channels": draw(ROWS, 1, 8, 8)},
            r"takes \(images, 8, height, width\).*, and 1 of its channels come from the input channels",
        ),
        ({}, {"timestep_cond": draw(ROWS, 8)}, "the input timestep_cond is none that a UNet2DConditionModel takes"),
        ({}, {"depth": draw(ROWS, 8)}, "the input depth is none"),
        (
            {},
            {"down_block_additional_residuals.0": draw(ROWS, 16, 8, 8)},
            "down_block_additional_residuals without mid_block_additional_residual",
        ),
    ],
)
def test_rows_that_lack_an_input_or_have_an_unknown_one_are_refused(settings, inputs, reason):
    unet = pipelines.unet(**settings)
    context = draw(ROWS, 5, unet.config.cross_attention_dim)
    rows = CalibrationRows(draw(ROWS, 4, 8, 8), STEPS, context, inputs)
    before = copy.deepcopy(unet.state_dict())
    with pytest.raises(ValueError, match=reason):
        quantize_(
            unet,
            Precision.parse("w8a8"),
            networks.recipe(data=networks.drawing(rows)),
            networks.pool_of(rows),
            networks.generator(),
        )
    assert all(torch.equal(value, unet.state_dict()[name]) for name, value in before.items())


def test_rows_need_as_many_of_each_input():
    with pytest.raises(ValueError, match="2 latents, 2 timesteps, 3 text_embeds"):
        CalibrationRows(draw(2, 4, 8, 8), torch.tensor([1, 2]), None, {"text_embeds": draw(3, 6)})
    assert CalibrationRows(draw(2, 4, 8, 8), torch.tensor([1, 2])).inputs == NO_INPUTS
