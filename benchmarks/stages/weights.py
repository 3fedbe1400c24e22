"""weights: a fetched evaluator or CLIP becomes the folder in `data/` that scores load it from."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import dataclass
from pathlib import Path

from benchmarks.runtime import files, manifest
from benchmarks.sources import disk
from benchmarks.sources.archive import Mismatch
from benchmarks.stages.fetch import checked, unfit
from benchmarks.suite import discover

DATA = Path("data")
INCEPTION = "inception"


@dataclass(frozen=True)
class OpenClip:
    """An architecture of open_clip and the name of its weights, which is the folder's and so in the score's heading."""

    architecture: str
    weights: str


# OpenAI's weights were trained with the quick approximation of GELU.
CLIPS = {
    "open-clip-vit-b-32": OpenClip("ViT-B-32-quickgelu", "openai"),
    "open-clip-vit-g-14": OpenClip("ViT-g-14", "laion2b_s12b_b42k"),
}


def run(name: str) -> Path:
    """Make the folder of a source and return it.

    Raises ValueError with the nearest name if the source is not an evaluator, and for a missing or damaged file.
    """
    if name != INCEPTION and name not in CLIPS:
        raise discover.unknown("evaluator", name, [INCEPTION, *CLIPS], "Those of sources.yaml are meant.")
    path, _ = checked(name)
    folder = folder_of(name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    disk.sweep(folder)
    disk.check(folder.parent, path.stat().st_size)
    with files.new_folder(folder) as temporary:
        if name == INCEPTION:
            try:
                _inception(path, temporary)
            except Mismatch as reason:
                raise unfit(name, path, reason) from None
        else:
            _clip(path, temporary, CLIPS[name])
        manifest.write(temporary)
    return folder


def folder_of(name: str) -> Path:
    """The folder that is made of a source."""
    return DATA / INCEPTION if name == INCEPTION else DATA / "clip" / CLIPS[name].weights


def _inception(path: Path, folder: Path) -> None:
    import torch

    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError):  # their texts advise to trust the file
        tensors = None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise Mismatch("it is not a dictionary of tensors, or damaged")
    files.write_tensors(folder / "model.safetensors", {name: tensor.contiguous() for name, tensor in tensors.items()})


def _clip(path: Path, folder: Path, clip: OpenClip) -> None:
    import open_clip

    config = {"model_cfg": open_clip.get_model_config(clip.architecture), "preprocess_cfg": {}}
    files.write_text(folder / "open_clip_config.json", json.dumps(config, indent=2) + "\n")
    shutil.copy(path, folder / f"open_clip_model{path.suffix}")
