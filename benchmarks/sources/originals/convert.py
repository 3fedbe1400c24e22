"""Write an original checkpoint as the folder of networks and a scheduler that `benchmarks/models` loads."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import diffusers
import torch
from diffusers import SchedulerMixin
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTokenizer, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME

from benchmarks.sources import disk
from benchmarks.sources.archive import Mismatch
from benchmarks.sources.originals import checkpoint_file, expected
from benchmarks.sources.originals.architectures import Architecture
from benchmarks.sources.originals.checkpoint_file import CheckpointFile
from benchmarks.sources.originals.expected import Part

# Greatest difference of the file's noise schedule from the one that diffusers computes in float32. It is 2e-9 and 6e-7
# for the published ones; another model's schedule differs by 1e-3 and more.
SCHEDULE = {"betas": 1e-8, "alphas_cumprod": 1e-6}

# What pipelines have beside networks and a scheduler. No safety checker, which the published numbers are without.
PIPELINES = {
    "DDIMPipeline": {},
    "LDMPipeline": {},
    "StableDiffusionPipeline": {
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    },
    "StableDiffusionXLPipeline": {
        "feature_extractor": [None, None],
        "force_zeros_for_empty_prompt": True,
        "image_encoder": [None, None],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
    },
}
TOKENIZER = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "tokenizer_class": "CLIPTokenizer",
    "unk_token": "<|endoftext|>",
}
# The tokenizer of each text tower, and what it pads with: OpenCLIP pads with the first of all tokens.
TOKENIZERS = {"text_encoder": ("tokenizer", "<|endoftext|>"), "text_encoder_2": ("tokenizer_2", "!")}


def convert(architecture: Architecture, checkpoint: Path, folder: Path) -> None:
    """Write the networks and the scheduler of ``checkpoint`` into ``folder``, with one network in memory at a time.

    Raises Mismatch for a file that is damaged, of another architecture, or of another noise schedule, and ValueError if
    it is missing or the disk has no room for its networks.
    """
    with checkpoint_file.opened(checkpoint) as file:
        parts = expected.match(architecture, file).parts
        scheduler = getattr(diffusers, architecture.scheduler["_class_name"]).from_config(dict(architecture.scheduler))
        _check_schedule(scheduler, file)
        if architecture.scale_in_file:
            parts["vqvae"].network.register_to_config(scaling_factor=_scale(file))
        disk.check(folder, architecture.dtype.itemsize * sum(part.count for part in parts.values()))
        for name, part in parts.items():
            _write_part(part, file, folder / name)
    scheduler.save_pretrained(folder / "scheduler")
    if architecture.pipeline is not None:
        members = {name: _origin(part.network) for name, part in parts.items()} | {"scheduler": _origin(scheduler)}
        described = {"_class_name": architecture.pipeline, "_diffusers_version": diffusers.__version__}
        _write_json(folder / "model_index.json", described | members | PIPELINES[architecture.pipeline])


def write_tokenizer(vocabulary: Path, merges: Path, folder: Path) -> None:
    """Write CLIP's tokenizer from its published files into ``folder``, for each text tower of `convert`.

    Raises ValueError if a file is missing or damaged, or if a text tower has another count of tokens.
    """
    for tower, (name, padding) in TOKENIZERS.items():
        if (folder / tower).is_dir():
            _write_tokenizer(vocabulary, merges, CLIPTextConfig.from_pretrained(folder / tower), folder / name, padding)


def _write_tokenizer(vocabulary: Path, merges: Path, text: CLIPTextConfig, target: Path, padding: str) -> None:
    target.mkdir()
    for source, name in ((vocabulary, "vocab.json"), (merges, "merges.txt")):
        if not source.is_file():
            raise ValueError(f"{source} is missing: fetch it first")
        shutil.copyfile(source, target / name)
    settings = TOKENIZER | {"model_max_length": text.max_position_embeddings, "pad_token": padding}
    _write_json(target / "tokenizer_config.json", settings)
    try:
        tokenizer = CLIPTokenizer.from_pretrained(target)
    except Exception as error:  # of many kinds, from several libraries
        reason = " ".join(str(error).split())
        raise ValueError(f"{vocabulary} and {merges} are no tokenizer ({reason}): fetch them again") from None
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    if (len(tokenizer), *ends) != (text.vocab_size, text.bos_token_id, text.eos_token_id):
        raise ValueError(f"{vocabulary} has {len(tokenizer)} tokens, and the text encoder {text.vocab_size} others")


def _write_part(part: Part, file: CheckpointFile, folder: Path) -> None:
    tensors = {}
    for source in part.sources:
        tensors |= source.split(file.read(source.key))
    of_transformers = isinstance(part.network, PreTrainedModel)
    if of_transformers:
        part.network.config.save_pretrained(folder)
    else:
        part.network.save_config(folder)
    path = folder / (SAFE_WEIGHTS_NAME if of_transformers else SAFETENSORS_WEIGHTS_NAME)
    try:
        save_file(tensors, path, {"format": "pt"})
    except SafetensorError as error:
        raise ValueError(f"{path} could not be written ({error}): make room on the disk and run again") from None


def _origin(member: object) -> list[str]:
    return [type(member).__module__.partition(".")[0], type(member).__name__]


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check_schedule(scheduler: SchedulerMixin, file: CheckpointFile) -> None:
    """Compare what the file says of its noise schedule, if anything, with the scheduler."""
    for name, tolerance in SCHEDULE.items():
        if name not in file.tensors:
            continue
        theirs, ours = file.read(name), getattr(scheduler, name)
        if theirs.shape != ours.shape or not torch.allclose(theirs, ours, rtol=0, atol=tolerance):
            config = scheduler.config
            raise Mismatch(
                f"its noise schedule ({name}) is not that of {config.num_train_timesteps} steps with beta from"
                f" {config.beta_start} to {config.beta_end} ({config.beta_schedule})"
            )


def _scale(file: CheckpointFile) -> float:
    """The first stage's scale: 1 / deviation of the latents that training began with."""
    if "scale_factor" not in file.tensors:
        raise Mismatch("its scale_factor is missing")
    scale = file.read("scale_factor")
    if scale.numel() != 1 or not 0 < scale.item() < math.inf:
        raise Mismatch(f"its scale_factor is {scale.tolist()}, but must be one positive number")
    return scale.item()
