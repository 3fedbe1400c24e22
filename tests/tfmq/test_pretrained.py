"""Quantised networks and pipelines in diffusers' own folders: what is loaded computes what was saved, or is refused."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from safetensors.torch import load_file, save_file

from tests.tfmq import networks
from tfmq.network.attention_heads import set_attention_heads
from tfmq.network.calibration import collect_calibration
from tfmq.network.sampling import Conditioning, SamplingSettings
from tfmq.packing import packed_bytes
from tfmq.passes import Recipe
from tfmq.passes.activation_ranges import ActivationRanges
from tfmq.passes.adaptive_probabilities import AdaptiveProbabilities
from tfmq.passes.channel_scales import ScaleChannels
from tfmq.passes.correction import MeasureCorrection, correction_of
from tfmq.passes.low_rank import LowRankBranches
from tfmq.passes.temporal_cache import TemporalCache
from tfmq.passes.weight_ranges import RoundToNearest, WeightRanges
from tfmq.pretrained import plain_config
from tfmq.state import coverage

WEIGHTS = "diffusion_pytorch_model.safetensors"


def cached(where: str) -> Recipe:
    usual = networks.recipe(scales="temporal")
    return (TemporalCache("all"), *usual) if where == "all" else (*usual, TemporalCache(where))


def eight_heads() -> UNet2DModel:
    unet = networks.unconditional()
    set_attention_heads(unet, 8)
    return unet


RECIPES = {
    "shared": ("w4a4", networks.recipe(), networks.unconditional),
    "weights alone": ("w4a32", networks.recipe(), networks.unconditional),
    "temporal": ("w4a8", networks.recipe(scales="temporal"), networks.unconditional),
    "cached": ("w4a8", cached("all"), networks.unconditional),
    "cached where better": ("w4a8", cached("step"), networks.unconditional),
    "split": ("w4a8", networks.recipe(split_shortcuts=True), networks.unconditional),
    "heads": ("w4a8", networks.recipe(), eight_heads),
    "scaled and adaptive": (
        "w4a4",
        (
            ScaleChannels(layers="all", data=networks.ALL_ROWS),
            WeightRanges("minmax"),
            RoundToNearest(),
            AdaptiveProbabilities(networks.ALL_ROWS),
            ActivationRanges(networks.ALL_ROWS),
        ),
        networks.unconditional,
    ),
    "low rank": (
        "w4a4",
        (
            LowRankBranches(rank=2, candidates=1, search_rows=3, data=networks.ALL_ROWS, batch=6),
            WeightRanges("minmax"),
            RoundToNearest(),
            ActivationRanges(networks.ALL_ROWS),
        ),
        networks.unconditional,
    ),
}


@torch.no_grad()
def predict(network: UNet2DModel, step: int = 1) -> torch.Tensor:
    return network(networks.noise(), step).sample


@pytest.mark.parametrize(("precision", "recipe", "build"), RECIPES.values(), ids=RECIPES)
def test_a_folder_gives_the_network_back(precision, recipe, build, tmp_path):
    unet, full, recorded, _ = networks.quantized(recipe, precision, build)
    unet.save_pretrained(tmp_path)
    loaded = UNet2DModel.from_pretrained(tmp_path)
    for step in recorded.timesteps[:2].tolist():
        assert torch.equal(predict(loaded, step), predict(unet, step))
        assert not torch.allclose(predict(loaded, step), predict(full, step))
        assert torch.isfinite(predict(loaded, step)).all()
    assert coverage(loaded) == coverage(unet) and not loaded.training
    held = sum(tensor.nbytes for tensor in load_file(tmp_path / WEIGHTS).values())
    assert held == packed_bytes(unet)

    loaded.save_pretrained(tmp_path / "again")  # what was loaded is saved as it is
    for name in (WEIGHTS, "config.json"):
        first, again = ((folder / name).read_bytes() for folder in (tmp_path, tmp_path / "again"))
        assert first == again or json.loads(first) == without_path(again)


def without_path(config: bytes) -> dict[str, object]:
    return {name: value for name, value in json.loads(config).items() if name != "_name_or_path"}


def test_a_network_with_context(tmp_path):
    kind = networks.KINDS["text"]
    unet, _, recorded, _ = networks.quantized(
        networks.recipe(), "w4a4", networks.conditional, kind.pool(networks.conditional())
    )
    unet.save_pretrained(tmp_path / "unet")
    step, context = recorded.timesteps[0], kind.conditioning(4).context
    with torch.no_grad():
        outputs = [
            each(networks.noise(), step, context).sample
            for each in (unet, UNet2DConditionModel.from_pretrained(tmp_path / "unet"))
        ]
    assert torch.equal(*outputs)


def test_a_transformer(tmp_path):
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 3, "out_channels": 3, "num_layers": 2}
    network = DiTTransformer2DModel(**sizes, sample_size=8, patch_size=2, num_embeds_ada_norm=10).eval()
    conditioning = Conditioning(torch.tensor([0, 3, 2, 1]), torch.full((4,), 10))
    settings = SamplingSettings(5, guidance_scale=2.0)
    pool = collect_calibration(
        network, networks.scheduler(), networks.noise(), settings, batch=4, conditioning=conditioning
    )
    networks.quantized(cached("all"), "w4a8", lambda: network, pool)
    network.save_pretrained(tmp_path)
    loaded = DiTTransformer2DModel.from_pretrained(tmp_path)
    steps, classes = pool.timesteps[:1].expand(4), torch.tensor([0, 1, 10, 3])
    with torch.no_grad():
        outputs = [each(networks.noise(), timestep=steps, class_labels=classes).sample for each in (network, loaded)]
    assert torch.equal(*outputs) and torch.isfinite(outputs[0]).all()


OPTIONS = {
    "shards": {"max_shard_size": "20KB"},
    "pickle": {"safe_serialization": False},
    "variant": {"variant": "w4a4"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_way_of_writing_a_folder(options, tmp_path):
    unet, *_ = networks.quantized(networks.recipe(), "w4a4")
    unet.save_pretrained(tmp_path / "ein Ordner – 模型", **options)
    variant = options.get("variant")
    assert torch.equal(
        predict(UNet2DModel.from_pretrained(tmp_path / "ein Ordner – 模型", variant=variant)), predict(unet)
    )


def test_a_pipeline_gives_itself_back(tmp_path):
    unet, full, recorded, _ = networks.quantized(cached("all"), "w4a4")
    draw = {"batch_size": 2, "num_inference_steps": len(recorded.timesteps), "output_type": "np"}
    images = []
    for network in (full, unet):
        pipeline = DDIMPipeline(network, networks.scheduler())
        images.append(pipeline(**draw, generator=torch.Generator().manual_seed(4)).images)
    pipeline.save_pretrained(tmp_path)
    loaded = DDIMPipeline.from_pretrained(tmp_path)
    again = loaded(**draw, generator=torch.Generator().manual_seed(4)).images
    assert (again == images[1]).all() and abs(images[1] - images[0]).max() > 0.01
    assert coverage(loaded.unet) == coverage(unet)


@pytest.mark.filterwarnings("ignore:this network carries a noise correction")
def test_a_noise_correction_is_kept_and_told(tmp_path):
    unet, *_ = networks.quantized((*networks.recipe(), MeasureCorrection(4, 4)), "w4a4")
    unet.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="noise correction"):
        loaded = UNet2DModel.from_pretrained(tmp_path)
    for name, value in correction_of(unet).state_dict().items():
        assert torch.equal(correction_of(loaded).state_dict()[name], value)


def test_diffusers_without_this_library_refuses_the_folder(tmp_path):
    unet, *_ = networks.quantized(networks.recipe(), "w4a4")
    DDIMPipeline(unet, networks.scheduler()).save_pretrained(tmp_path)
    code = f"""
from diffusers import DDIMPipeline, UNet2DModel
for kind, folder in ((UNet2DModel, {str(tmp_path / "unet")!r}), (DDIMPipeline, {str(tmp_path)!r})):
    try:
        kind.from_pretrained(folder)
    except ValueError as error:
        assert "Unknown quantization type, got tfmq" in str(error)
    else:
        raise AssertionError("loaded")
import tfmq.pretrained
DDIMPipeline.from_pretrained({str(tmp_path)!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_importing_the_library_stays_cheap():
    code = "import sys, tfmq; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert not {"torch", "diffusers", "tfmq.pretrained"} & set(done.stdout.split())


def test_damaged_folders_are_refused(tmp_path):
    unet, *_ = networks.quantized(networks.recipe(), "w4a4")
    unet.save_pretrained(tmp_path)
    tensors, config = load_file(tmp_path / WEIGHTS), json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    codes = tensors["conv_in.codes"].clone()
    codes[0] ^= 1
    save_file(tensors | {"conv_in.codes": codes}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="damaged, its tensors are not what the hash"):
        UNet2DModel.from_pretrained(tmp_path)
    save_file(tensors, tmp_path / WEIGHTS)
    config["quantization_config"]["format"] = "tfmq-quantized-1"
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match="format tfmq-quantized-1, and this version reads"):
        UNet2DModel.from_pretrained(tmp_path)


def test_a_network_that_could_not_be_loaded_is_not_saved(tmp_path):
    unet, *_ = networks.quantized(networks.recipe(), "w4a4")
    other = copy.deepcopy(unet)
    other.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"extra\.bias is no part of it: undo the later change"):
        other.save_pretrained(tmp_path / "folder")
    unet.set_submodule("conv_in", torch.nn.Conv2d(3, 16, 1))
    with pytest.raises(ValueError, match=r"conv_in\.weight is of shape"):
        unet.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_the_plain_config_is_as_diffusers_writes_it():
    for unet in (networks.unconditional(), networks.conditional(), eight_heads()):
        assert plain_config(unet) == unet.to_json_string()


def test_precision_can_be_chosen_while_loading(tmp_path):
    unet, *_ = networks.quantized(networks.recipe(), "w4a32")
    unet.save_pretrained(tmp_path)
    loaded = UNet2DModel.from_pretrained(tmp_path, torch_dtype=torch.float64)
    assert loaded.dtype == torch.float64
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(networks.noise().double(), 1).sample, predict(unet).double(), rtol=1e-3, atol=1e-4
        )
