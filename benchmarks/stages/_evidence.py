"""What metrics are computed from: features of images, and distances of pairs of images and of image and prompt.

Images are read in chunks, and a part of them is a unit of work, whose file `read_parts` puts together with the others.
Only these few numbers an image are ever in memory for all images.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.features import Evaluator, Features, compare, extract, extract_with_maps
from benchmarks.features._clip import Scorer, cosines, load_clip, prompt_vectors
from benchmarks.runtime import files
from benchmarks.runtime.images import Images
from benchmarks.stages._data_features import evaluator_of, second_evaluator_of
from benchmarks.stages._setup import batches, prompts_of
from benchmarks.suite.record import FULL_PRECISION, Cell
from benchmarks.suite.tasks import Task

# Images of a part, and those in memory at once. Both are multiples of what evaluators and CLIPs take at a time, which
# therefore see the same batches in parts as in all images.
PART = 1024
CHUNK = 64

# Files of the features of a part, one row an image, and of the feature maps of a chunk, each named by its first image.
SEEN, MAPS = "seen", "maps"


def parts(task: Task) -> list[range]:
    """A cell's images as units of work."""
    return batches(task.images, PART)


def evaluators(task: Task, device: torch.device) -> tuple[Evaluator, Evaluator | None]:
    """The task's evaluator and its second one, if it has one; they stay loaded."""
    return evaluator_of(task, device), second_evaluator_of(task, device)


def scorers(task: Task, device: torch.device) -> list[Scorer]:
    """The task's CLIPs; they stay loaded."""
    return [_scorer(Path(folder), device) for folder in task.clip]


def identities(task: Task, device: torch.device) -> dict[str, object]:
    """The identities of the task's evaluators and CLIPs."""
    evaluator, second = evaluators(task, device)
    return {
        "evaluator": evaluator.identity,
        "second_evaluator": None if second is None else second.identity,
        "clip": [scorer.identity for scorer in scorers(task, device)],
    }


def release() -> None:
    """Give back the memory of evaluators and CLIPs."""
    for cached in (evaluator_of, second_evaluator_of, _scorer):
        cached.cache_clear()


def extract_part(task: Task, cell: Cell, device: torch.device, folder: Path, part: range) -> None:
    """Write to ``folder`` the features of a part of a cell's images.

    With those of full precision go the feature maps that the evaluator keeps; with those of all other cells, their
    distances to full precision. Raises ValueError for images that are missing, or not of the task's count or size.
    """
    evaluator, second = evaluators(task, device)
    clips = scorers(task, device)
    prompts = prompts_of(task, "sample", part) if clips else []
    vectors = [prompt_vectors(clip, prompts) for clip in clips]
    images, paired = _images(task, cell), _images(task, files.full_precision_cell(cell))
    extracted: list[dict[str, Tensor]] = []
    for start in range(0, len(part), CHUNK):
        chunk = part[start : start + CHUNK]
        pixels = images.read(chunk)
        found: dict[str, Tensor] = {}
        if cell.method != FULL_PRECISION:
            others = paired.read(chunk)
            features, found["perceptual_distance"] = compare(evaluator, pixels, _maps(task, evaluator, others, chunk))
            found["squared_error"] = (pixels.double() - others.double()).square().mean(dim=(1, 2, 3))
        elif evaluator.extractor.keeps_maps:
            features, maps = extract_with_maps(evaluator, pixels)
            files.write_tensors(folder / _name(MAPS, chunk), {str(index): layer for index, layer in enumerate(maps)})
        else:
            features = extract(evaluator, pixels)
        found |= vars(features)
        if second is not None:
            found["second_features"] = extract(second, pixels).pooled
        if clips:
            own = [rows[start : start + CHUNK] for rows in vectors]
            found["clip_cosines"] = torch.stack([cosines(*each, pixels) for each in zip(clips, own, strict=True)], 1)
        extracted.append(found)
    together = {name: torch.cat([found[name] for found in extracted]) for name in extracted[0]}
    files.write_tensors(folder / _name(SEEN, part), together)


def read_parts(folder: Path) -> tuple[Features, dict[str, Tensor]]:
    """What `extract_part` wrote of all parts of a cell: features, and all else by name, one row an image.

    Raises ValueError where there is nothing.
    """
    found = [files.read_tensors(path) for path in sorted(folder.glob(f"{SEEN}-*"))]
    if not found:
        raise ValueError(f"{folder} is missing or empty: run `dvc repro`, which makes it")
    together = {name: torch.cat([part.pop(name) for part in found]) for name in list(found[0])}
    return Features(**{name: together.pop(name) for name in ("pooled", "spatial", "logits")}), together


@lru_cache(maxsize=2)
def _scorer(folder: Path, device: torch.device) -> Scorer:
    return load_clip(folder, device)


def _images(task: Task, cell: Cell) -> Images:
    images = files.read_images(cell)
    count, _, height, width = images.shape
    if (count, height, width) != (task.images, task.resolution, task.resolution):
        raise ValueError(
            f"{cell.name} has {count} images of {height} x {width} pixels, but the task has {task.images} of"
            f" {task.resolution} x {task.resolution}: run `dvc repro`"
        )
    return images


def _maps(task: Task, evaluator: Evaluator, paired: Tensor, chunk: range) -> list[Tensor]:
    """The unit maps of the full-precision images of a chunk: those that were kept, or made again."""
    if not evaluator.extractor.keeps_maps:
        return list(extract_with_maps(evaluator, paired)[1])
    kept = files.read_tensors(files.paired(task.name) / _name(MAPS, chunk))
    return [kept[str(index)] for index in range(len(kept))]


def _name(kind: str, images: range) -> str:
    return f"{kind}-{images.start:08d}.safetensors"
