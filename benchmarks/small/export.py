"""Write the trained networks as a diffusers folder, and the evaluator's weights as safetensors."""

import copy
import hashlib
import json
import shutil
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    LDMPipeline,
    ModelMixin,
    PNDMScheduler,
    SchedulerMixin,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTokenizer, PreTrainedModel

from benchmarks.runtime import manifest


def export_pipeline(
    first_stage: VQModel | AutoencoderKL, unet: UNet2DModel, scheduler: DDIMScheduler, folder: Path
) -> None:
    """Write an unconditional latent diffusion pipeline in float16; replace what `folder` held.

    The networks themselves stay as they are.
    """
    unfinished = _unfinished(folder)
    LDMPipeline(_half(first_stage), _half(unet), scheduler).save_pretrained(unfinished, safe_serialization=True)
    manifest.write(unfinished)
    _replace(unfinished, folder)


def export_text_to_image(
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
    scheduler: DDIMScheduler,
    folder: Path,
) -> None:
    """Write a Stable Diffusion pipeline with PNDM on the same schedule; replace what `folder` held.

    The text encoder stays in float32, since transformers loads weights in the precision that it finds; diffusers does
    not, and what it loads is written in float16.
    """
    unfinished = _unfinished(folder)
    pipeline = StableDiffusionPipeline(
        vae=_half(vae),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=_half(unet),
        scheduler=PNDMScheduler.from_config(scheduler.config, skip_prk_steps=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(unfinished, safe_serialization=True)
    manifest.write(unfinished)
    _replace(unfinished, folder)


def export_transformer(
    first_stage: VQModel, transformer: DiTTransformer2DModel, scheduler: DDIMScheduler, classes: list[str], folder: Path
) -> None:
    """Write a class-conditional DiTPipeline in float16; replace what `folder` held."""
    unfinished = _unfinished(folder)
    labels = {index: name.replace(",", " ") for index, name in enumerate(classes)}
    pipeline = DiTPipeline(_half(transformer), _half(first_stage), scheduler, labels)
    pipeline.register_to_config(id2label=labels)
    pipeline.save_pretrained(unfinished, safe_serialization=True)
    manifest.write(unfinished)
    _replace(unfinished, folder)


def export_parts(
    parts: dict[str, ModelMixin | PreTrainedModel | SchedulerMixin | CLIPTokenizer | Path], folder: Path
) -> None:
    """Write the parts of a model to subfolders, those of diffusers in float16; replace what `folder` held.

    For models that no stock pipeline runs. A path is a folder to copy, so that models that share it share its bytes.
    """
    unfinished = _unfinished(folder)
    for name, part in parts.items():
        if isinstance(part, Path):
            shutil.copytree(part, unfinished / name)
        elif isinstance(part, ModelMixin):
            _half(part).save_pretrained(unfinished / name, safe_serialization=True)
        else:
            part.save_pretrained(unfinished / name)
    manifest.write(unfinished)
    _replace(unfinished, folder)


def export_evaluator(weights: Path, sha256: str, path: Path) -> None:
    """Write the tensors of a PyTorch weights file, under their own names, as safetensors.

    Kernels and matrices become float16, which halves the file; what normalises stays float32, since running variances
    reach below float16's range. Raises ValueError if the file is not the one with that SHA-256.
    """
    check_sha256(weights, sha256)
    tensors = torch.load(weights, map_location="cpu", weights_only=True)
    converted = {name: (tensor.half() if tensor.ndim > 1 else tensor).contiguous() for name, tensor in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    # One entry: the order of several would change from run to run, and the file's hash with it.
    save_file(converted, unfinished, {"source": f"{weights.name} sha256:{sha256}"})
    unfinished.chmod(0o644)
    unfinished.replace(path)
    manifest.write(path.parent)


def publish(source: Path, folder: Path) -> None:
    """Replace `folder` by a copy of `source`."""
    unfinished = _unfinished(folder)
    shutil.copytree(source, unfinished)
    _replace(unfinished, folder)


def record(folder: Path, path: Path) -> None:
    """Write the size and SHA-256 of each file below `folder` to a JSON file."""
    files = {}
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        files[file.relative_to(folder).as_posix()] = {"bytes": file.stat().st_size, "sha256": digest}
    write_json(files, path)


def write_json(content: dict, path: Path) -> None:
    """Write a mapping as JSON under a temporary name, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(path)


def check_sha256(path: Path, sha256: str) -> None:
    """Raise a ValueError unless the file has that SHA-256."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ValueError(f"{path.name} has the SHA-256 {found}, not {sha256}: install the package's version again.")


def _half(network: ModelMixin) -> ModelMixin:
    copied = copy.deepcopy(network).half()
    # Where a network was loaded from is a path of the machine that trained it.
    copied.register_to_config(_name_or_path="")
    return copied


def _unfinished(folder: Path) -> Path:
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    return unfinished


def _replace(unfinished: Path, folder: Path) -> None:
    # A folder cannot be renamed onto one that holds files.
    replaced = folder.with_name(f".{folder.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    for file in unfinished.rglob("*.safetensors"):
        file.chmod(0o644)
    if folder.exists():
        folder.rename(replaced)
    unfinished.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)
