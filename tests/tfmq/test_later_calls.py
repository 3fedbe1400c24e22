"""Later calls on a quantised network are carried on, or refused with the way out, and coverage tells what is so."""

from __future__ import annotations

import copy
import io
import pickle
import re
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    LDMPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, IPAdapterAttnProcessor2_0
from peft import LoraConfig
from torch import nn

from tests.tfmq import networks
from tfmq.checkpoint import load_quantized, save_quantized
from tfmq.modules.attention import QuantizedAttention
from tfmq.state import coverage, restore_weights

KIND = networks.KINDS["text"]
UNDONE = "would undo quantisation.*enable_attention_slicing"
LORA = LoraConfig(r=2, target_modules=["to_q", "to_v", "conv1", "time_emb_proj"], init_lora_weights=False)


@pytest.fixture(scope="module")
def made():
    recorded = KIND.pool(networks.conditional())
    recipe = networks.recipe(scales="temporal")
    unet, full, _, _ = networks.quantized(recipe, "w4a4", networks.conditional, recorded)
    return unet, full, recorded


@pytest.fixture
def unet(made):
    return copy.deepcopy(made[0])


@pytest.fixture
def predict(made):
    """Predicts the noise of three images at a time step of the pool."""

    @torch.no_grad()
    def predicted(network: nn.Module, step: int = 1) -> torch.Tensor:
        return network(networks.noise(3), made[2].timesteps[step], KIND.conditioning(3).context).sample

    return predicted


def with_lora(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    torch.manual_seed(3)
    unet.add_adapter(LORA)
    return unet


def reloaded(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    file = io.BytesIO()
    torch.save(unet, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def chunked(unet: UNet2DConditionModel) -> None:
    for module in unet.modules():
        if hasattr(module, "set_chunk_feed_forward"):
            module.set_chunk_feed_forward(2, 1)


CARRIED = {
    "attention slicing": lambda unet: unet.set_attention_slice("auto"),
    "attention slicing, most": lambda unet: unet.set_attention_slice("max"),
    "xformers off": lambda unet: unet.disable_xformers_memory_efficient_attention(),
    "npu attention off": lambda unet: unet.disable_npu_flash_attention(),
    "xla attention off": lambda unet: unet.disable_xla_flash_attention(),
    "attention backend": lambda unet: (unet.set_attention_backend("native"), unet.reset_attention_backend()),
    "gradient checkpointing": lambda unet: unet.enable_gradient_checkpointing(),
    "forward chunking": chunked,
    "its own processors": lambda unet: unet.set_attn_processor(unet.attn_processors),
    "its own state": lambda unet: unet.load_state_dict(copy.deepcopy(unet.state_dict())),
    "layers channels last": lambda unet: unet.to(memory_format=torch.channels_last),
    "a LoRA attached and unloaded": lambda unet: with_lora(unet).unload_lora(),
    "FreeU on and off": lambda unet: (unet.enable_freeu(0.9, 0.2, 1.2, 1.4), unet.disable_freeu()),
}


@pytest.mark.parametrize("call", CARRIED.values(), ids=CARRIED)
def test_calls_that_change_no_arithmetic_are_carried_on(unet, made, predict, call):
    call(unet)
    torch.testing.assert_close(predict(unet), predict(made[0]), rtol=1e-5, atol=1e-5)
    assert coverage(unet) == coverage(made[0])


REFUSED = {
    "processor": (lambda unet: unet.set_attn_processor(AttnProcessor()), UNDONE),
    "processors": (lambda unet: unet.set_attn_processor(dict.fromkeys(unet.attn_processors, AttnProcessor())), UNDONE),
    "one attention's processor": (
        lambda unet: unet.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(AttnProcessor2_0()),
        UNDONE,
    ),
    "IP-Adapter's processors": (
        lambda unet: unet.set_attn_processor(IPAdapterAttnProcessor2_0(hidden_size=16, cross_attention_dim=12)),
        UNDONE,
    ),
    "IP-Adapter": (lambda unet: unet._load_ip_adapter_weights([]), "IP-Adapter would undo quantisation"),
    "default processor": (lambda unet: unet.set_default_attn_processor(), "QuantizedAttention"),
    "xformers": (lambda unet: unet.enable_xformers_memory_efficient_attention(), UNDONE),
    "npu attention": (lambda unet: unet.enable_npu_flash_attention(), UNDONE),
    "xla attention": (lambda unet: unet.enable_xla_flash_attention(), UNDONE),
    "fused projections": (lambda unet: unet.fuse_qkv_projections(), "without fuse_qkv_projections"),
    "a full-precision state": (
        lambda unet: unet.load_state_dict(networks.conditional(5).state_dict(), strict=False),
        "load it into the full-precision network",
    ),
    "dequantize": (lambda unet: unet.dequantize(), "load the full-precision checkpoint"),
    "slices": (lambda unet: unet.mid_block.attentions[0].transformer_blocks[0].attn1.set_attention_slice(0), "1 to 4"),
}


@pytest.mark.parametrize(("call", "way_out"), REFUSED.values(), ids=REFUSED)
def test_calls_that_would_undo_quantisation_are_refused_and_change_nothing(unet, made, predict, call, way_out):
    with pytest.raises(ValueError, match=f"(?s){way_out}"):
        call(unet)
    assert torch.equal(predict(unet), predict(made[0]))
    assert coverage(unet) == coverage(made[0])


def test_slices_evaluate_an_image_at_a_time(unet, monkeypatch):
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    hidden = torch.randn(3, 16, 32, generator=torch.Generator().manual_seed(0))
    unet.step_tracker.set(int(unet.step_tracker.steps[0]))
    expected, rows = attention(hidden), []
    evaluate = QuantizedAttention._of_images
    monkeypatch.setattr(
        QuantizedAttention,
        "_of_images",
        lambda self, attn, query, *rest: rows.append(len(query)) or evaluate(self, attn, query, *rest),
    )
    unet.set_attention_slice("auto")
    torch.testing.assert_close(attention(hidden), expected)
    assert rows == [attention.heads] * 3
    unet.set_attention_slice([None] * len(unet.attn_processors))
    torch.testing.assert_close(attention(hidden), expected)
    assert rows[3:] == [3 * attention.heads]


def test_attentions_that_stay_in_full_precision_take_other_processors(made, predict):
    recipe = networks.recipe()
    unet, *_ = networks.quantized(recipe, "w4a32", networks.conditional, made[2])
    expected = predict(unet)
    for call in (lambda: unet.set_attn_processor(AttnProcessor()), lambda: unet.set_attention_slice("auto")):
        call()
        torch.testing.assert_close(predict(unet), expected, rtol=1e-4, atol=1e-5)
    unet.set_default_attn_processor()
    torch.testing.assert_close(predict(unet), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="projections of this attention are quantised"):
        unet.fuse_qkv_projections()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda unet: pickle.loads(pickle.dumps(unet)), reloaded])
def test_copies_are_quantised_and_on_their_own(unet, made, predict, copied, tmp_path):
    other = copied(unet)
    assert torch.equal(predict(other), predict(made[0])) and coverage(other) == coverage(unet)
    with pytest.raises(ValueError, match=UNDONE):
        other.set_attn_processor(AttnProcessor())
    with torch.no_grad():
        other.conv_in.weight.add_(1)
    assert coverage(unet) == coverage(made[0]) != coverage(other)
    unet.save_pretrained(tmp_path)  # reads its own network, not the one that it was copied from
    with pytest.raises(ValueError, match="conv_in"):
        other.save_pretrained(tmp_path)


def test_an_attached_lora_adds_its_branch_and_is_covered_but_not_stored(unet, made, predict, tmp_path):
    seen = {}
    attention = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    with_lora(unet).get_submodule(attention).register_forward_hook(
        lambda module, inputs, output: seen.update(x=inputs[0], y=output)
    )
    predict(unet)
    adapter = unet.get_submodule(attention)
    branch = seen["x"] @ adapter.lora_A["default"].weight.T @ adapter.lora_B["default"].weight.T
    quantized = made[0].get_submodule(attention)
    made[0].step_tracker.set(made[2].timesteps[1])
    expected = quantized(seen["x"]) + branch * LORA.lora_alpha / LORA.r
    torch.testing.assert_close(seen["y"], expected)

    before, rows = coverage(made[0]), coverage(unet)
    assert [row for row in rows if "adapter" not in row.reason] == before
    added = {row.path for row in rows if "adapter" in row.reason}
    assert f"{attention}.lora_A.default" in added and "mid_block.resnets.0.conv1.lora_B.default" in added
    for save in (lambda: save_quantized(unet, tmp_path / "q", {}), lambda: unet.save_pretrained(tmp_path / "folder")):
        with pytest.raises(ValueError, match="save_lora_adapter.*unload_lora"):
            save()
    assert not list(tmp_path.iterdir())
    unet.unload_lora()
    save_quantized(unet, tmp_path / "q", {})
    assert torch.equal(predict(load_quantized(tmp_path / "q")), predict(made[0]))


def test_a_lora_that_is_fused_later_is_refused_until_the_codes_are_back(unet, made, predict, tmp_path):
    with_lora(unet).fuse_lora()
    with pytest.raises(ValueError, match="LoRA is fused into .*unfuse_lora and tfmq.restore_weights"):
        predict(unet)
    unet.unload_lora()  # keeps the fused weights
    for _ in range(2):
        with pytest.raises(ValueError, match="no longer that of its codes: a LoRA was fused into it.*restore_weights"):
            predict(unet)
    changed = {row.path for row in coverage(unet) if "LoRA was fused" in row.reason}
    assert "mid_block.resnets.0.conv1" in changed and "conv_in" not in changed
    assert all(row.weight_bits == 32 for row in coverage(unet) if row.path in changed and "product" not in row.kind)
    with pytest.raises(ValueError, match="no longer that of its codes.*restore_weights"):
        save_quantized(unet, tmp_path / "q", {})
    restore_weights(unet)
    assert torch.equal(predict(unet), predict(made[0])) and coverage(unet) == coverage(made[0])


def test_a_lora_before_quantising_is_fused_or_refused(made, predict):
    full = with_lora(networks.conditional())
    with pytest.raises(ValueError, match="fuse_lora and unload_lora"):
        networks.quantized(networks.recipe(), "w8a32", lambda: full, made[2])
    attached = predict(full)
    full.fuse_lora()
    full.unload_lora()
    unet, *_ = networks.quantized(networks.recipe(), "w8a32", lambda: copy.deepcopy(full), made[2])
    torch.testing.assert_close(predict(full), attached, rtol=1e-3, atol=1e-3)
    error = (predict(unet) - attached).norm() / attached.norm()
    assert error < 0.1 < (predict(networks.conditional()) - attached).norm() / attached.norm()


BEFORE = {
    "FreeU": (lambda unet: unet.enable_freeu(0.9, 0.2, 1.2, 1.4), "disable_freeu"),
    "fused projections": (lambda unet: unet.fuse_qkv_projections(), "unfuse_qkv_projections"),
    "IP-Adapter": (
        lambda unet: unet.set_attn_processor(IPAdapterAttnProcessor2_0(hidden_size=16, cross_attention_dim=12)),
        "unload the IP-Adapter",
    ),
}


@pytest.mark.parametrize(("call", "way_out"), BEFORE.values(), ids=BEFORE)
def test_what_a_quantised_network_would_lose_is_refused_before(made, call, way_out):
    full = networks.conditional()
    with torch.no_grad():
        call(full)
    with pytest.raises(ValueError, match=way_out):
        networks.quantized(networks.recipe(), "w8a8", lambda: full, made[2])


def test_freeu_scales_as_in_the_stock_network_and_is_not_stored(made, predict, tmp_path):
    unet, *_ = networks.quantized(networks.recipe(), "w8a32", networks.conditional, made[2])
    full = copy.deepcopy(made[1])
    plain = predict(full)
    for network in (unet, full):
        network.enable_freeu(0.9, 0.2, 1.2, 1.4)
    assert (predict(unet) - predict(full)).norm() < 0.2 * (predict(full) - plain).norm()
    with pytest.raises(ValueError, match="disable_freeu, save"):
        save_quantized(unet, tmp_path / "q", {})


CHANGES = {
    "weight written": (lambda unet: unet.conv_in.weight.data.mul_(1.5), "conv_in", "no longer that of its codes"),
    "weight assigned": (
        lambda unet: setattr(unet.conv_out, "weight", nn.Parameter(torch.zeros_like(unet.conv_out.weight))),
        "conv_out",
        "no longer that of its codes",
    ),
    "layer replaced": (
        lambda unet: unet.set_submodule("conv_in", nn.Conv2d(3, 16, 3, padding=1)),
        "conv_in",
        "put in place after quantising",
    ),
    "quantiser replaced": (
        lambda unet: setattr(unet.conv_in, "input_quantizer", nn.Identity()),
        "conv_in",
        "quantiser was replaced",
    ),
    "codes written": (lambda unet: unet.conv_in.codes.zero_(), "conv_in", "no longer that of its codes"),
}


@pytest.mark.parametrize(("change", "path", "reason"), CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_coverage_tells_what_direct_assignments_have_changed(unet, made, change, path, reason):
    change(unet)
    before = coverage(made[0])
    (row,) = (row for row in coverage(unet) if row not in before)
    assert row.path == path and reason in row.reason and 32 in (row.weight_bits, row.activation_bits)


def test_the_report_reads_the_network(made):
    unet, _, _, report = networks.quantized(networks.recipe(), "w8a8", networks.conditional, made[2])
    assert report.coverage == coverage(unet) and not any(row.reason for row in report.coverage)
    with_lora(unet)
    assert report.coverage == coverage(unet) and any(row.reason for row in report.coverage)


def test_the_pipelines_slicing_is_carried(tmp_path):
    unet, _, recorded, _ = networks.quantized(networks.recipe(), "w8a8")
    pipeline = DDIMPipeline(unet, networks.scheduler())
    steps = len(recorded.timesteps)
    draw = {"batch_size": 2, "num_inference_steps": steps, "output_type": "np"}
    expected = pipeline(**draw, generator=torch.Generator().manual_seed(4)).images
    pipeline.enable_attention_slicing()
    assert pipeline(**draw, generator=torch.Generator().manual_seed(4)).images == pytest.approx(expected, abs=1e-5)
    assert coverage(unet) == coverage(pipeline.unet) and not any(row.reason for row in coverage(unet))


def test_the_page_tells_of_every_public_call():
    page = (Path(__file__).parents[2] / "docs" / "later_calls.md").read_text(encoding="utf-8")
    told = set(re.findall(r"[`.]([a-z]\w+)`", page))
    networks_ = (UNet2DModel, UNet2DConditionModel, DiTTransformer2DModel)
    pipelines = (LDMPipeline, StableDiffusionPipeline, DiTPipeline, DDIMPipeline)
    for kind in (*networks_, *pipelines):
        names = {name for name in dir(kind) if not name.startswith("_")} - set(dir(nn.Module))
        assert names <= told, f"docs/later_calls.md does not say what becomes of {sorted(names - told)}"


def test_compiled_networks_look_their_time_step_up():
    unet, _, recorded, _ = networks.quantized(networks.recipe(scales="temporal"), "w4a4")
    x, steps = networks.noise(2), recorded.timesteps
    torch._dynamo.reset()
    compiled = torch.compile(unet, backend="eager")
    with torch.no_grad():
        outputs = [unet(x, step).sample for step in steps[:2]]
        assert not torch.allclose(outputs[0], outputs[1])
        for step, expected in zip(steps[:2], outputs, strict=True):
            torch.testing.assert_close(compiled(x, step).sample, expected)
        torch._dynamo.reset()
        with pytest.raises(Exception, match="compile it without fullgraph=True"):
            torch.compile(unet, backend="eager", fullgraph=True)(x, steps[0])
        with pytest.raises(ValueError, match="torch.export cannot follow the time step.*torch.compile"):
            torch.export.export(unet, (x, steps[0]))
        torch._dynamo.reset()


def test_a_network_without_tables_is_exported_for_a_time_step():
    unet, _, recorded, _ = networks.quantized(networks.recipe(), "w4a4")
    x, step = networks.noise(2), int(recorded.timesteps[0])
    with torch.no_grad():
        exported = torch.export.export(unet, (x, step)).module()
        torch.testing.assert_close(exported(x, step).sample, unet(x, step).sample)
        with pytest.raises(AssertionError, match="timestep"):
            exported(x, step - 1)
        with pytest.raises(ValueError, match="as an int"):
            torch.export.export(unet, (x, recorded.timesteps[0]))
