"""A tiny original checkpoint becomes a folder that its family loads; another file is refused and says why."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.loaders import single_file_utils
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from benchmarks.runtime import manifest
from benchmarks.sources.archive import Mismatch
from benchmarks.sources.originals.architectures import ARCHITECTURES
from benchmarks.sources.originals.convert import convert, write_tokenizer
from benchmarks.suite import discover
from tests.benchmarks.sources.originals import facts, tiny

CPU = torch.device("cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"
TOKENIZERS = ("tokenizer", "tokenizer_2")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def converted(request, tmp_path_factory):
    """Name, original tensors and folder of each tiny checkpoint."""
    folder = tmp_path_factory.mktemp(request.param)
    write_folder(request.param, folder)
    return request.param, tiny.state_dict(request.param), folder / "converted"


def write_folder(architecture: str, folder: Path) -> None:
    tiny.write_original(architecture, folder / "original.ckpt")
    (folder / "converted").mkdir()
    convert(ARCHITECTURES[architecture], folder / "original.ckpt", folder / "converted")
    if ARCHITECTURES[architecture].tiny.text_encoder is not None:
        tiny.write_tokenizer(folder / "vocab.json", folder / "merges.txt")
        write_tokenizer(folder / "vocab.json", folder / "merges.txt", folder / "converted")
    manifest.write(folder / "converted")


def test_the_family_loads_the_folder(converted):
    name, tensors, folder = converted
    kind = ARCHITECTURES[name]
    model = discover.family(kind.family).load(folder, CPU)
    side = kind.tiny.unet["sample_size"]
    assert model.latent_shape == (kind.tiny.unet["in_channels"], side, side)
    assert {parameter.dtype for parameter in model.unet.parameters()} == {torch.float32}
    assert type(model.scheduler).__name__ == kind.scheduler["_class_name"]
    assert model.unet.config.get("attention_heads") == kind.tiny.heads
    images = model.decode(torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0)))
    assert images.dtype == torch.uint8 and images.shape[:2] == (2, 3) and images.float().std() > 10
    assert (model.conditioning is None) == (kind.family in ("ldm", "ddpm"))
    if model.conditioning is not None:
        found = model.conditioning(["3", "7"])
        assert found.context.shape[2] == model.unet.config.cross_attention_dim


def test_weights_are_those_that_the_samplers_take(converted):
    name, tensors, folder = converted
    written = load_file(folder / "unet" / WEIGHTS)["conv_in.weight"]
    raw, averaged = "model.diffusion_model.input_blocks.0.0.weight", "model_ema.diffusion_modelinput_blocks00weight"
    key = {"ldm": averaged, "ddpm": "conv_in.weight"}.get(ARCHITECTURES[name].family, raw)
    assert torch.equal(written, tensors[key])
    if key == averaged:
        assert not torch.equal(written, tensors[raw])


def scale(name, tensors):
    """Of the first stage: the file's where it has one, else the published one."""
    if "scale_factor" in tensors:
        return tensors["scale_factor"].item()
    published = {known["architecture"]: known["settings"]["full"] for known in map(facts.of, facts.MODELS)}
    return 0.13025 if name == "sdxl" else published[name]["first_stage"]["scaling_factor"]


def test_scale_and_schedule_are_the_models_own(converted):
    name, tensors, folder = converted
    for path in (folder / "vae", folder / "vqvae"):
        if path.exists():
            found = json.loads((path / "config.json").read_text())["scaling_factor"]
            assert found == pytest.approx(scale(name, tensors), rel=1e-6)
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    assert not scheduler.config.clip_sample and not scheduler.config.thresholding
    if "alphas_cumprod" in tensors:
        torch.testing.assert_close(scheduler.alphas_cumprod, tensors["alphas_cumprod"], rtol=0, atol=1e-6)


def test_the_stock_pipeline_loads_the_folder(converted):
    name, _, folder = converted
    kind = ARCHITECTURES[name]
    assert (folder / "model_index.json").exists() == (kind.pipeline is not None)
    if kind.pipeline is not None:
        options = {"safety_checker": None} if kind.pipeline == "StableDiffusionPipeline" else {}
        assert type(DiffusionPipeline.from_pretrained(folder, **options)).__name__ == kind.pipeline


def test_the_xl_file_becomes_what_diffusers_makes_of_it(tmp_path):
    write_folder("sdxl", tmp_path)
    kind, tensors = ARCHITECTURES["sdxl"].tiny, dict(tiny.state_dict("sdxl"))
    second = CLIPTextModelWithProjection.from_pretrained(tmp_path / "converted" / "text_encoder_2")
    expected = {
        f"unet/{WEIGHTS}": single_file_utils.convert_ldm_unet_checkpoint(dict(tensors), kind.unet),
        f"vae/{WEIGHTS}": single_file_utils.convert_ldm_vae_checkpoint(dict(tensors), kind.first_stage),
        "text_encoder/model.safetensors": single_file_utils.convert_ldm_clip_checkpoint(
            tensors, remove_prefix="conditioner.embedders.0.transformer."
        ),
        "text_encoder_2/model.safetensors": single_file_utils.convert_open_clip_checkpoint(
            second, tensors, "conditioner.embedders.1.model."
        ),
    }
    for path, theirs in expected.items():
        ours = load_file(tmp_path / "converted" / path)
        assert {value.dtype for value in ours.values()} == {torch.float16}
        named = {key.removeprefix("text_model."): value for key, value in theirs.items() if "position_ids" not in key}
        assert named.keys() == {key.removeprefix("text_model.") for key in ours}
        for key, value in ours.items():
            assert torch.equal(value, named[key.removeprefix("text_model.")]), key


def test_each_text_tower_has_its_tokenizer(tmp_path):
    write_folder("sdxl", tmp_path)
    padding = [CLIPTokenizer.from_pretrained(tmp_path / "converted" / name).pad_token for name in TOKENIZERS]
    assert padding == ["<|endoftext|>", "!"]


def test_a_damaged_or_other_safetensors_file_is_refused_in_one_line(tmp_path):
    tiny.write_original("sdxl", tmp_path / "a.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(data[:-1000])
    with pytest.raises(Mismatch, match="it is damaged or truncated"):
        convert(ARCHITECTURES["sdxl"], tmp_path / "a.safetensors", tmp_path)
    weights = {key: value.float() for key, value in tiny.state_dict("sdxl").items()}
    save_file(weights, tmp_path / "a.safetensors")
    with pytest.raises(Mismatch, match="has numbers of type torch.float32, not torch.float16"):
        convert(ARCHITECTURES["sdxl"], tmp_path / "a.safetensors", tmp_path)


def test_the_same_file_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_folder("ldm8-churches", tmp_path / name)
    listings = [(tmp_path / name / "converted" / manifest.NAME).read_bytes() for name in ("a", "b")]
    assert listings[0] == listings[1]


@cache
def churches() -> dict[str, torch.Tensor]:
    return tiny.state_dict("ldm8-churches")


def refused(tensors: dict[str, object], architecture: str, folder: Path) -> str:
    """The line that converting ``tensors`` is refused with."""
    torch.save({"state_dict": tensors}, folder / "a.ckpt")
    (folder / "out").mkdir()
    with pytest.raises(Mismatch) as error:
        convert(ARCHITECTURES[architecture], folder / "a.ckpt", folder / "out")
    assert str(error.value).startswith("it") and "\n" not in str(error.value)
    return str(error.value)


UNET, FIRST = "model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.encoder.conv_in.weight"
AVERAGED = "model_ema.diffusion_modelout2bias"
SHAPE = churches()[UNET].shape
POINTWISE = torch.Size((*SHAPE[:2], 1, 1))
SCHEDULE = ARCHITECTURES["ldm8-churches"].scheduler
STEPS, FROM, TO = (SCHEDULE[name] for name in ("num_train_timesteps", "beta_start", "beta_end"))
FAULTS = {
    "missing": ({"model.diffusion_model.out.2.bias": None}, "model.diffusion_model.out.2.bias is missing"),
    "missing first stage": ({FIRST: None}, f"{FIRST} is missing"),
    "missing average": ({AVERAGED: None}, f"{AVERAGED} is missing"),
    "no tensor": ({UNET: "a text"}, f"{UNET} is missing"),
    "shape": (
        {UNET: torch.zeros(POINTWISE)},
        re.escape(f"{UNET} has shape {list(POINTWISE)}, not {list(SHAPE)}"),
    ),
    "type": ({UNET: torch.zeros(SHAPE).half()}, f"{UNET} has numbers of type torch.float16, not torch.float32"),
    "unexpected": (
        {"model.diffusion_model.out.3.bias": torch.zeros(3)},
        "model.diffusion_model.out.3.bias is unexpected",
    ),
    "unexpected average": ({"model_ema.more": torch.zeros(3)}, "model_ema.more is unexpected"),
    "unexpected condition": ({"cond_stage_model.a": torch.zeros(3)}, "cond_stage_model.a is unexpected"),
    "two": ({UNET: None, FIRST: None}, r"is missing \(the first of 2 faults\)"),
    "scale": ({"scale_factor": None}, "scale_factor is missing"),
    "no scale": ({"scale_factor": torch.tensor(0.0)}, "scale_factor is 0.0, but must be one positive number"),
    "schedule": (
        tiny.schedule(FROM, 2 * TO, STEPS),
        rf"\(betas\) is not that of {STEPS} steps with beta from {FROM} to {TO}",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_tensor_that_is_not_as_it_should_be_is_named(name, tmp_path):
    changes, line = FAULTS[name]
    tensors = {key: value for key, value in (churches() | changes).items() if value is not None}
    assert re.search(line, refused(tensors, "ldm8-churches", tmp_path))


@pytest.mark.parametrize(
    ("architecture", "names"),
    [
        ("ldm8-churches", ("ddim_sigmas", "logvar", "first_stage_model.loss.logvar")),
        ("ldm4-imagenet", ("ddim_alphas", "model_ema.diffusion_modelinput_blocks00weight")),
    ],
)
def test_what_sampling_has_no_use_for_is_ignored(architecture, names, tmp_path):
    weights = tiny.state_dict(architecture) | dict.fromkeys(names, torch.zeros(20))
    torch.save({"state_dict": weights}, tmp_path / "a.ckpt")
    convert(ARCHITECTURES[architecture], tmp_path / "a.ckpt", tmp_path)
    assert (tmp_path / "unet" / WEIGHTS).is_file()


@pytest.mark.parametrize(
    ("file", "asked"),
    [
        ("ldm4", "ldm8-churches"),
        ("ldm4", "ddim-cifar10"),
        ("ldm4-imagenet", "ldm4"),
        ("sd-v1", "ldm4-imagenet"),
        ("ddim-cifar10", "sd-v1"),
        ("sdxl", "sd-v1"),
        ("sd-v1", "sdxl"),
    ],
)
def test_a_checkpoint_of_another_model_says_which(file, asked, tmp_path):
    line = f"is a checkpoint of {ARCHITECTURES[file].title}, not of {ARCHITECTURES[asked].title}"
    assert refused(tiny.state_dict(file), asked, tmp_path).endswith(line)


def test_a_model_of_no_known_architecture_is_refused(tmp_path):
    line = refused(torch.nn.Linear(3, 3).state_dict(), "ldm4", tmp_path)
    assert "is not a checkpoint of unconditional LDM-4" in line and "is missing" in line


def test_damage_stops_the_conversion(tmp_path):
    tiny.write_original("ldm8-churches", tmp_path / "a.ckpt")
    data = bytearray((tmp_path / "a.ckpt").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "a.ckpt").write_bytes(data)
    (tmp_path / "out").mkdir()
    with pytest.raises(Mismatch, match="it is damaged or truncated .*Bad CRC-32"):
        convert(ARCHITECTURES["ldm8-churches"], tmp_path / "a.ckpt", tmp_path / "out")


def test_a_full_disk_is_said_in_one_line(tmp_path, monkeypatch):
    tiny.write_original("ddim-cifar10", tmp_path / "a.ckpt")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
        with pytest.raises(ValueError, match="bytes are needed in .*, but 1,000 are free: make room"):
            convert(ARCHITECTURES["ddim-cifar10"], tmp_path / "a.ckpt", tmp_path)

    def full(*arguments: object) -> None:
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr("benchmarks.sources.originals.convert.save_file", full)
    with pytest.raises(ValueError, match=r"could not be written \(No space left on device .*: make room on the disk"):
        convert(ARCHITECTURES["ddim-cifar10"], tmp_path / "a.ckpt", tmp_path)


def text_encoder(folder: Path, tokens: int) -> None:
    settings = {"vocab_size": tokens, "bos_token_id": tokens - 2, "eos_token_id": tokens - 1}
    CLIPTextConfig(**settings, max_position_embeddings=77).save_pretrained(folder / "text_encoder")


def test_the_published_tokenizer_splits_text_as_openais_code_does(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    reference = open_clip.SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    tokens = {names.get(token, token): index for token, index in reference.encoder.items()}
    merges = "".join(f"{first} {second}\n" for first, second in reference.bpe_ranks)
    (tmp_path / "v.json").write_text(json.dumps(tokens, ensure_ascii=False), encoding="utf-8")
    (tmp_path / "m.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    text_encoder(tmp_path, 49408)
    write_tokenizer(tmp_path / "v.json", tmp_path / "m.txt", tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    prompts = ["", "A man riding a wave on top of a surfboard.", "It's 3 o'clock; two-way traffic!", "café   NAÏVE été"]
    found = tokenizer(prompts, padding="max_length", truncation=True, max_length=77).input_ids
    for ids, prompt in zip(found, prompts, strict=True):
        assert ids == [49406, *reference.encode(prompt), *[49407] * (76 - len(reference.encode(prompt)))]
    long = tokenizer("red apple " * 60, padding="max_length", truncation=True, max_length=tokenizer.model_max_length)
    assert len(long.input_ids) == 77 and long.input_ids[-1] == 49407


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path):
    vocabulary, merges = tmp_path / "v.json", tmp_path / "m.txt"
    text_encoder(tmp_path, 49408)
    with pytest.raises(ValueError, match="v.json is missing: fetch it first"):
        write_tokenizer(vocabulary, merges, tmp_path)
    tiny.write_tokenizer(vocabulary, merges)
    (tmp_path / "tokenizer").rmdir()
    with pytest.raises(ValueError, match="v.json has 100 tokens, and the text encoder 49408 others"):
        write_tokenizer(vocabulary, merges, tmp_path)


def test_a_damaged_tokenizer_is_refused_in_one_line(tmp_path):
    vocabulary, merges = tmp_path / "v.json", tmp_path / "m.txt"
    text_encoder(tmp_path, 100)
    tiny.write_tokenizer(vocabulary, merges)
    vocabulary.write_bytes(vocabulary.read_bytes()[:300])
    with pytest.raises(ValueError, match="v.json and .*m.txt are no tokenizer .*fetch them again") as error:
        write_tokenizer(vocabulary, merges, tmp_path)
    assert "\n" not in str(error.value)
