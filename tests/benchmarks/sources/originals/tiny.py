"""Checkpoints in the formats of the original projects, with random weights, as small as the oracle's.

They are as published ones are: a Lightning file has callbacks, an optimiser and configuration objects of classes that
the reader does not have, weights averaged over training where the model has them, and the noise schedule; a safetensors
file is in float16.
"""

from __future__ import annotations

import io
import json
import math
import re
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import ModuleType

import safetensors.torch
import torch
from torch import Tensor

from benchmarks.sources.originals.architectures import ARCHITECTURES
from benchmarks.sources.originals.expected import expected

# Of the first stage of `ldm8-churches`.
SCALE = 0.2137
NORM = re.compile(r"(norm.*|\.ln_\w+)\.weight$")


def write_original(architecture: str, path: Path, seed: int = 0) -> None:
    """Write a checkpoint of an architecture (a name in ARCHITECTURES) to ``path``, as ``model.ckpt`` in a ``.zip``."""
    data = io.BytesIO()
    weights, kind = state_dict(architecture, seed), ARCHITECTURES[architecture]
    if kind.dtype == torch.float16:
        data.write(safetensors.torch.save(weights, {"modelspec.architecture": "stable-diffusion-xl-v1-base"}))
    elif kind.flat:
        torch.save(weights, data, _use_new_zipfile_serialization=False)
    else:
        save_lightning(weights, data)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("model.ckpt", data.getvalue())
    else:
        path.write_bytes(data.getvalue())


def write_tokenizer(vocabulary: Path, merges: Path, count: int | None = None) -> None:
    """Write the files of a tokenizer of ``count`` tokens, as many as the text tower of `state_dict` unless told.

    They are characters, each also at a word's end, others that no text has, and a text's two ends.
    """
    if count is None:
        (count,) = {kind.tiny.text_encoder["vocab_size"] for kind in ARCHITECTURES.values() if kind.tiny.text_encoder}
    characters = "abcdefghijklmnopqrstuvwxyz0123456789.,:;!?'-()&/+"
    tokens = [*characters, *(f"{one}</w>" for one in characters)]
    tokens = [*tokens, *(f"<|{index}|>" for index in range(count))][: count - 2]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    for path in (vocabulary, merges):
        path.parent.mkdir(parents=True, exist_ok=True)
    vocabulary.write_text(json.dumps({token: index for index, token in enumerate(tokens)}), encoding="utf-8")
    merges.write_text("#version: 0.2\n", encoding="utf-8")


def state_dict(architecture: str, seed: int = 0) -> OrderedDict[str, Tensor]:
    """The tensors of a tiny checkpoint by their original names: random, of about the size that training leaves them."""
    kind = ARCHITECTURES[architecture]
    generator = torch.Generator().manual_seed(seed)
    weights = OrderedDict()
    for key, shape in expected(kind, kind.tiny).shapes.items():
        numbers = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            weights[key] = numbers / math.sqrt(math.prod(shape[1:]))
        else:
            weights[key] = 0.1 * numbers + float(NORM.search(key) is not None)
    if kind.dtype == torch.float16:
        text = kind.tiny.text_encoder["max_position_embeddings"]
        weights["conditioner.embedders.0.transformer.text_model.embeddings.position_ids"] = torch.arange(text)[None]
        weights["conditioner.embedders.1.model.logit_scale"] = torch.tensor(4.6)
        return OrderedDict((key, value.half()) for key, value in weights.items())
    if not kind.flat:
        weights |= schedule(*(kind.scheduler[name] for name in ("beta_start", "beta_end", "num_train_timesteps")))
        weights["model_ema.decay"] = torch.tensor(0.9999)
        weights["model_ema.num_updates"] = torch.tensor(1000, dtype=torch.int32)
    if kind.scale_in_file:
        weights["scale_factor"] = torch.tensor(SCALE)
    if kind.tiny.text_encoder is not None:
        length = kind.tiny.text_encoder["max_position_embeddings"]
        weights["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(length)[None]
    return weights


def schedule(first: float, last: float, steps: int) -> dict[str, Tensor]:
    """Latent diffusion's noise schedule as its checkpoints store it, computed in float64."""
    betas = torch.linspace(math.sqrt(first), math.sqrt(last), steps, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, 0)
    found = {
        "betas": betas,
        "alphas_cumprod": alphas,
        "alphas_cumprod_prev": torch.cat([torch.ones(1, dtype=torch.float64), alphas[:-1]]),
        "sqrt_alphas_cumprod": alphas.sqrt(),
    }
    return {name: values.float() for name, values in found.items()}


def save_lightning(weights: dict[str, Tensor], file: io.BytesIO) -> None:
    """Save weights in a Lightning checkpoint with objects whose classes are gone when it is read."""
    names = ("pytorch_lightning_of_old", "pytorch_lightning_of_old.callbacks", "omegaconf_of_old")
    modules = {name: ModuleType(name) for name in names}
    for module, kind in ((names[1], "ModelCheckpoint"), (names[2], "DictConfig")):
        setattr(modules[module], kind, type(kind, (), {"__module__": module}))
    callback, configuration = modules[names[1]].ModelCheckpoint, modules[names[2]].DictConfig()
    configuration.content = {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "weights": torch.ones(3)}
    content = {
        "epoch": 12,
        "global_step": 470000,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": weights,
        "callbacks": {callback: {"best_model_score": torch.tensor(0.5), "best_model_path": "logs/last.ckpt"}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(4)}}, "param_groups": [{"lr": 1e-4}]}],
        "hyper_parameters": configuration,
        "loops": {torch.nn.Linear, complex, print},
    }
    sys.modules.update(modules)
    try:
        torch.save(content, file)
    finally:
        for name in names:
            del sys.modules[name]
