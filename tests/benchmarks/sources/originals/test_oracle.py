"""Converted checkpoints compute what the original code computed on the same weights (shared/reference/checkpoints)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file, safe_open
from torch import Tensor
from transformers import CLIPTextModel

from benchmarks.models import Model
from benchmarks.models._latent import load_first_stage
from benchmarks.models._quad import QuadDDIMScheduler
from benchmarks.runtime import manifest
from benchmarks.sources.originals.architectures import ARCHITECTURES
from benchmarks.sources.originals.convert import convert, write_tokenizer
from benchmarks.suite import discover
from tests.benchmarks.sources.originals import tiny
from tfmq.network.sampling import Conditioning, SamplingSettings, sample

FOLDER = Path(__file__).parents[5] / "shared" / "reference" / "checkpoints"
NAMES = {
    "ldm4": "ldm4_lsun_bedrooms",
    "ldm8-churches": "ldm8_lsun_churches",
    "ldm4-imagenet": "ldm4_imagenet_cin256v2",
    "sd-v1": "sd_v1_4",
    "ddim-cifar10": "ddim_cifar10",
}
CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"the outputs of the original code are not in {FOLDER}")


@dataclass(frozen=True)
class Case:
    """A converted oracle: its folder, the model in it, the original code's inputs and outputs, and what they are of."""

    name: str
    folder: Path
    model: Model
    io: dict[str, Tensor]
    guidance_scale: float


@pytest.fixture(scope="module")
def case(request, tmp_path_factory):
    """The case of an architecture, which `cases` gives it."""
    folder = tmp_path_factory.mktemp(request.param) / "converted"
    convert_oracle(request.param, folder, ARCHITECTURES[request.param].averaged)
    path = FOLDER / f"{NAMES[request.param]}_tiny_io.safetensors"
    with safe_open(path, "pt") as file:
        scale = float((file.metadata() or {}).get("guidance_scale", 1))
    model = discover.family(ARCHITECTURES[request.param].family).load(folder, CPU)
    return Case(request.param, folder, model, load_file(path), scale)


def convert_oracle(name: str, folder: Path, averaged: bool) -> None:
    """Put the oracle's weights into a file as published ones are, and convert that."""
    weights = {}
    for path in sorted(FOLDER.glob(f"{NAMES[name]}_tiny*.safetensors")):
        weights |= {} if path.name.endswith("_io.safetensors") else load_file(path)
    folder.mkdir()
    with (folder.parent / "original.ckpt").open("wb") as file:
        if ARCHITECTURES[name].flat:
            torch.save(weights, file)
        else:
            tiny.save_lightning(weights, file)
    convert(dataclasses.replace(ARCHITECTURES[name], averaged=averaged), folder.parent / "original.ckpt", folder)
    if ARCHITECTURES[name].tiny.text_encoder is not None:
        tiny.write_tokenizer(folder.parent / "vocab.json", folder.parent / "merges.txt")
        write_tokenizer(folder.parent / "vocab.json", folder.parent / "merges.txt", folder)
    manifest.write(folder)


def cases(*names: str) -> pytest.MarkDecorator:
    """Parametrise a test with the cases of some architectures."""
    return pytest.mark.parametrize("case", names, indirect=True)


def close(found: Tensor, expected: Tensor) -> None:
    """Single calls agree within 4e-6; the smallest wrong choice, an epsilon, costs 3e-5."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def contexts(case: Case) -> Conditioning | None:
    if "context" not in case.io:
        return None
    return Conditioning(case.io["context"], case.io["uncond_context"])


@torch.no_grad()
def predicted(case: Case, model: Model) -> Tensor:
    conditioning = contexts(case)
    inputs = (case.io["x"], case.io["t"]) + ((conditioning.context,) if conditioning else ())
    return model.unet(*inputs).sample


@cases(*NAMES)
def test_the_unet_predicts_the_same_noise(case):
    names = ("unet_out_ema", "unet_out_raw") if ARCHITECTURES[case.name].averaged else ("unet_out_raw", "unet_out")
    close(predicted(case, case.model), next(case.io[name] for name in names if name in case.io))


@cases("ldm4", "ldm8-churches")
def test_the_weights_before_averaging_are_mapped_alike(case, tmp_path):
    convert_oracle(case.name, tmp_path / "raw", averaged=False)
    model = discover.family(ARCHITECTURES[case.name].family).load(tmp_path / "raw", CPU)
    close(predicted(case, model), case.io["unet_out_raw"])
    assert (case.io["unet_out_raw"] - case.io["unet_out_ema"]).abs().max() > 1


@cases("ldm4", "ldm8-churches", "ldm4-imagenet", "sd-v1")
@torch.no_grad()
def test_the_first_stage_decodes_and_encodes_alike(case):
    path = case.folder / ("vae" if case.name == "sd-v1" else "vqvae")
    first_stage = load_first_stage(path).eval()
    expected = case.io["decode_first_stage_out"]
    close(first_stage.decode(case.io["z"] / first_stage.config.scaling_factor).sample, expected)
    encoded = first_stage.encode(case.io["image"])
    if "encode_out" in case.io:
        close(encoded.latents, case.io["encode_out"])
        unquantized = first_stage.decode(case.io["z"], force_not_quantize=True).sample
        close(unquantized, case.io["decode_force_not_quantize_out"])
    else:
        close(encoded.latent_dist.mean, case.io["encode_mean"])
        close(encoded.latent_dist.logvar, case.io["encode_logvar"])
    images = ((expected + 1) / 2).clamp(0, 1) * 255
    assert (case.model.decode(case.io["z"]).float() - images).abs().max() < 0.5 + 1e-2


@cases("ldm4-imagenet")
def test_a_class_is_the_same_token(case):
    found = case.model.conditioning([str(label) for label in case.io["class_labels"].tolist()])
    assert torch.equal(found.context, case.io["context"])
    assert torch.equal(found.unconditional, case.io["uncond_context"])


@cases("sd-v1")
@torch.no_grad()
def test_a_text_has_the_same_context(case):
    text = CLIPTextModel.from_pretrained(case.folder / "text_encoder").eval()
    close(text(case.io["input_ids"]).last_hidden_state, case.io["context"])
    close(text(case.io["uncond_input_ids"]).last_hidden_state, case.io["uncond_context"])


# How the original code sampled: steps that were taken, eta, and the name of their list.
SAMPLERS = {
    "ddim20_eta0": (20, 0.0, "ddim20_timesteps"),
    "ddim20_eta1": (20, 1.0, "ddim20_timesteps"),
    "ddim200_eta0": (200, 0.0, "ddim200_timesteps"),
    "ddim400_eta0": (500, 0.0, "ddim400_timesteps"),
    "plms50": (50, 0.0, "plms50_timesteps"),
    "ddim100_uniform": (100, 0.0, "ddim100_uniform_seq"),
    "ddim100_quad": (100, 0.0, "ddim100_quad_seq"),
    "ddim20_quad": (20, 0.0, "ddim20_quad_seq"),
}


SAMPLED = {
    "ldm4": ("ddim20_eta0", "ddim20_eta1", "ddim200_eta0"),
    "ldm8-churches": ("ddim20_eta0", "ddim20_eta1", "ddim400_eta0"),
    "ldm4-imagenet": ("ddim20_eta0", "ddim20_eta1"),
    "sd-v1": ("ddim20_eta0", "ddim20_eta1", "plms50"),
    "ddim-cifar10": ("ddim100_uniform", "ddim100_quad", "ddim20_quad"),
}


@pytest.mark.parametrize(
    ("case", "name"), [(case, name) for case, names in SAMPLED.items() for name in names], indirect=["case"]
)
def test_the_sampling_loop_gives_the_same_latents(case, name):
    steps, eta, timesteps = SAMPLERS[name]
    scheduler = case.model.scheduler
    if name.endswith("_quad"):
        scheduler = QuadDDIMScheduler.from_config(scheduler.config)
    elif name.startswith("ddim"):
        scheduler = DDIMScheduler.from_config(scheduler.config)
    visited = []
    found = sample(
        case.model.unet,
        scheduler,
        case.io["x_T"],
        SamplingSettings(steps, eta, case.guidance_scale),
        conditioning=contexts(case),
        step_noise=case.io.get(f"{name}_noise"),
        callback=lambda step: visited.append(step.timestep),
    )
    expected = case.io[name]
    assert ((found - expected).abs().max() / expected.abs().max()).item() <= 1e-5
    if name == "plms50":  # its first step is taken twice
        visited.pop(1)
    assert visited == case.io[timesteps].flip(0).tolist()
