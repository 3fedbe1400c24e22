"""Converted checkpoints compute what the original code computed on the same weights (shared/reference/checkpoints)."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor
from transformers import CLIPTextModel

from benchmarks.models import Model
from benchmarks.models._latent import load_first_stage
from benchmarks.models._quad import QuadDDIMScheduler
from benchmarks.runtime import manifest
from benchmarks.sources.originals.architectures import ARCHITECTURES, Architecture, Size
from benchmarks.sources.originals.convert import convert, write_tokenizer
from benchmarks.suite import discover
from tests import checkpoints
from tests.benchmarks.sources.originals import facts, tiny
from tfmq.network.sampling import Conditioning, SamplingSettings, sample

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """A converted oracle: its folder, the model in it, the original code's inputs and outputs, and what they are of."""

    family: str
    folder: Path
    model: Model
    io: dict[str, Tensor]


@pytest.fixture(scope="module")
def case(request, tmp_path_factory):
    """The case of a model, which `cases` gives it."""
    folder = tmp_path_factory.mktemp(request.param) / "converted"
    kind = architecture(request.param)
    convert_oracle(request.param, kind, folder)
    model = discover.family(kind.family).load(folder, CPU)
    return Case(request.param, folder, model, checkpoints.outputs(request.param))


def architecture(family: str) -> Architecture:
    """The model's architecture, its tiny size and its sampler as described beside the checkpoint."""
    known, described = ARCHITECTURES[facts.of(family)["architecture"]], checkpoints.described(family)
    size = described["tiny"]
    return replace(
        known,
        averaged="unet_out_ema" in checkpoints.names(family),
        scheduler={**known.scheduler, **described["diffusers"]["scheduler"]},
        tiny=Size(
            unet=size["diffusers_unet"],
            first_stage=size.get("diffusers_first_stage"),
            text_encoder={"_class_name": "CLIPTextModel", **size["clip_text_config"]}
            if "clip_text_config" in size
            else None,
            classes=size["class_embedding"]["n_classes"] - 1 if "class_embedding" in size else 0,
            heads=checkpoints.heads(family),
        ),
    )


def convert_oracle(family: str, kind: Architecture, folder: Path) -> None:
    """Put the oracle's weights into a file as published ones are, and convert that."""
    folder.mkdir()
    with (folder.parent / "original.ckpt").open("wb") as file:
        if kind.flat:
            torch.save(checkpoints.weights(family), file)
        else:
            tiny.save_lightning(checkpoints.weights(family), file)
    convert(kind, folder.parent / "original.ckpt", folder)
    if kind.tiny.text_encoder is not None:
        vocabulary, merges = folder.parent / "vocab.json", folder.parent / "merges.txt"
        tiny.write_tokenizer(vocabulary, merges, kind.tiny.text_encoder["vocab_size"])
        write_tokenizer(vocabulary, merges, folder)
    manifest.write(folder)


def cases(*needed: str) -> pytest.MarkDecorator:
    """Parametrise a test with the models whose inputs and outputs include those of these names."""
    found = [family for family in checkpoints.FAMILIES if checkpoints.names(family).issuperset(needed)]
    return pytest.mark.parametrize(
        "case", checkpoints.those(f"model with {' and '.join(needed)}", found), indirect=True
    )


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


@cases("x", "t")
def test_the_unet_predicts_the_same_noise(case):
    names = ("unet_out_ema", "unet_out_raw", "unet_out")
    close(predicted(case, case.model), next(case.io[name] for name in names if name in case.io))


@cases("unet_out_raw", "unet_out_ema")
def test_the_weights_before_averaging_are_mapped_alike(case, tmp_path):
    kind = replace(architecture(case.family), averaged=False)
    convert_oracle(case.family, kind, tmp_path / "raw")
    model = discover.family(kind.family).load(tmp_path / "raw", CPU)
    close(predicted(case, model), case.io["unet_out_raw"])
    assert (case.io["unet_out_raw"] - case.io["unet_out_ema"]).abs().max() > 0.1


@cases("decode_first_stage_out")
@torch.no_grad()
def test_the_first_stage_decodes_and_encodes_alike(case):
    (path,) = [case.folder / name for name in ("vae", "vqvae") if (case.folder / name).exists()]
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


@cases("class_labels")
def test_a_class_is_the_same_token(case):
    found = case.model.conditioning([str(label) for label in case.io["class_labels"].tolist()])
    assert torch.equal(found.context, case.io["context"])
    assert torch.equal(found.unconditional, case.io["uncond_context"])


@cases("input_ids")
@torch.no_grad()
def test_a_text_has_the_same_context(case):
    text = CLIPTextModel.from_pretrained(case.folder / "text_encoder").eval()
    close(text(case.io["input_ids"]).last_hidden_state, case.io["context"])
    close(text(case.io["uncond_input_ids"]).last_hidden_state, case.io["uncond_context"])


# Names of samples: the sampler, the steps that it was asked for, and its eta (0 unless told) or how steps are spaced.
SAMPLES = re.compile(r"(?P<sampler>ddim|plms)(?P<asked>\d+)(?:_eta(?P<eta>[\d.]+)|_(?P<spacing>uniform|quad))?")
SAMPLED = [
    (family, name)
    for family in checkpoints.FAMILIES
    for name in sorted(checkpoints.names(family))
    if SAMPLES.fullmatch(name)
]


@pytest.mark.parametrize(("case", "name"), checkpoints.those("sample", SAMPLED, 2), indirect=["case"])
def test_the_sampling_loop_gives_the_same_latents(case, name):
    sampled = SAMPLES.fullmatch(name)
    steps = case.io[f"{name}_seq" if sampled["spacing"] else f"{sampled['sampler']}{sampled['asked']}_timesteps"]
    scheduler = case.model.scheduler
    if sampled["spacing"] == "quad":
        scheduler = QuadDDIMScheduler.from_config(scheduler.config)
    elif sampled["sampler"] == "ddim":
        scheduler = DDIMScheduler.from_config(scheduler.config)
    visited = []
    found = sample(
        case.model.unet,
        scheduler,
        case.io["x_T"],
        SamplingSettings(len(steps), float(sampled["eta"] or 0), checkpoints.guidance_scale(case.family)),
        conditioning=contexts(case),
        step_noise=case.io.get(f"{name}_noise"),
        callback=lambda step: visited.append(step.timestep),
    )
    expected = case.io[name]
    assert ((found - expected).abs().max() / expected.abs().max()).item() <= 1e-5
    if sampled["sampler"] == "plms":  # its first step is taken twice
        visited.pop(1)
    assert visited == steps.flip(0).tolist()
