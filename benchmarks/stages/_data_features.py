"""Features of a data set's images, a chunk at a time: their moments, and the pooled features of the first of them.

No more features are in memory than a chunk has, so a data set may have millions of images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.datasets import Images, dataset
from benchmarks.features import Evaluator, extract, extractor, load_evaluator
from benchmarks.metrics import Moments, ReferenceStatistics
from benchmarks.metrics._frechet import moments
from benchmarks.metrics._merge import merge
from benchmarks.runtime import files, manifest
from benchmarks.runtime.workers import run_all
from benchmarks.stages._setup import batches
from benchmarks.suite.tasks import Task

EVALUATORS = Path("data")
POOLED, SPATIAL, SECOND = "pooled", "spatial", "second"
DIGESTS = "digests"

# Images of which the features are in memory at once; so many pooled features are kept for kernel distances, precision
# and recall. Processes share units of 16 of the evaluator's batches.
CHUNK = 50_000
UNIT_BATCHES = 16


@dataclass(frozen=True)
class DataFeatures:
    """What is known of a data set's images: moments by both evaluators, pooled features of the first, and who they are.

    ``identity`` names the preprocessing, the count, and by a hash the pixels: equal only for the same images.
    """

    statistics: ReferenceStatistics
    pooled: Tensor
    second: Moments | None
    identity: str


@lru_cache(maxsize=1)
def evaluator_of(task: Task, device: torch.device) -> Evaluator:
    """The task's evaluator, whose weights lie in data/; the last one stays loaded."""
    return _evaluator(task.evaluator, device)


@lru_cache(maxsize=1)
def second_evaluator_of(task: Task, device: torch.device) -> Evaluator | None:
    """The task's second evaluator, if it has one; the last one stays loaded."""
    return None if task.second_evaluator is None else _evaluator(task.second_evaluator, device)


@lru_cache(maxsize=1)
def data_of(task: Task) -> Images:
    """The images of a task's data set that its own are compared with. Raises ValueError if there are too few."""
    images = dataset(task.dataset).images(Path(task.data), task.resolution)
    if task.data_images is None:
        return images
    if len(images) < task.data_images:
        raise ValueError(
            f"{task.data} has {len(images)} images, but data_images of task {task.name} asks for {task.data_images}:"
            " complete the data set"
        )
    return images.first(task.data_images)


def measure(task: Task, device: torch.device, folder: Path, shards: int) -> DataFeatures:
    """Features of a task's data by its evaluators; ``shards`` processes share the images.

    What is finished is kept in ``folder``, and not done again. With published statistics and no second evaluator no
    moments are asked for, and so no more images than have their pooled features kept.
    """
    count = len(data_of(task))
    if task.statistics is not None and task.second_evaluator is None:
        count = min(count, CHUNK)
    pieces = -(-count // CHUNK)
    for index in range(pieces):  # even ones: a covariance takes two images
        chunk = range(count * index // pieces, count * (index + 1) // pieces)
        finished = _file(folder, "chunk", chunk)
        if not finished.exists():
            paths = _extract_chunk(task, device, folder, chunk, shards)
            _fold(paths, finished, CHUNK - chunk.start)
    rows, digests = (torch.cat([part[name] for part in _chunks(folder)]) for name in (POOLED, DIGESTS))
    pixels = hashlib.sha256(digests.numpy().tobytes()).hexdigest()
    second = None if task.second_evaluator is None else _merged(folder, SECOND)
    return DataFeatures(
        statistics=ReferenceStatistics(_merged(folder, POOLED), _merged(folder, SPATIAL)),
        pooled=rows,
        second=second,
        identity=f"{dataset(task.dataset).identity}, {task.resolution}px, {count} images, pixels {pixels[:8]}",
    )


def tensors_of(found: Moments, kind: str) -> dict[str, Tensor]:
    """Tensors to save; `moments_in` is the inverse."""
    return {f"{kind}.{name}": torch.as_tensor(value) for name, value in vars(found).items()}


def moments_in(tensors: dict[str, Tensor], kind: str) -> Moments:
    """The moments that `tensors_of` made these of."""
    return Moments(tensors[f"{kind}.mean"], tensors[f"{kind}.covariance"], int(tensors[f"{kind}.count"]))


def _evaluator(name: str, device: torch.device) -> Evaluator:
    folder = EVALUATORS / extractor(name).weights
    manifest.verify(folder)
    return load_evaluator(name, folder / "model.safetensors", device)


def _extract_chunk(task: Task, device: torch.device, folder: Path, chunk: range, shards: int) -> list[Path]:
    """Files with the features of a chunk's images, in their order."""
    size = UNIT_BATCHES * evaluator_of(task, device).extractor.batch
    ranges = [chunk[rows.start : rows.stop] for rows in batches(len(chunk), size)]
    units = {images: _file(folder, "data", images) for images in ranges}
    missing = [unit for unit in units.items() if not unit[1].exists()]
    run_all(missing, partial(_extract, task, device), shards, device)
    return list(units.values())


def _extract(task: Task, device: torch.device, unit: tuple[range, Path]) -> None:
    """Write the features of some images, and the SHA-256 of each one's pixels."""
    images, path = unit
    evaluator, second = evaluator_of(task, device), second_evaluator_of(task, device)
    parts = []
    for pixels in data_of(task).batches(evaluator.extractor.batch, images):
        seen = extract(evaluator, pixels)
        digests = [list(hashlib.sha256(image.numpy().tobytes()).digest()) for image in pixels]
        part = {POOLED: seen.pooled, SPATIAL: seen.spatial, DIGESTS: torch.tensor(digests, dtype=torch.uint8)}
        parts.append(part if second is None else part | {SECOND: extract(second, pixels).pooled})
    files.write_tensors(path, _concatenated(parts))


def _fold(paths: list[Path], chunk: Path, kept: int) -> None:
    """Put the moments of a chunk, and the first ``kept`` of its pooled features, in the place of its features."""
    found = _concatenated([files.read_tensors(path) for path in paths])
    tensors = {DIGESTS: found.pop(DIGESTS), POOLED: found[POOLED][: max(0, kept)]}
    for kind, seen in found.items():
        tensors |= tensors_of(moments(seen), kind)
    files.write_tensors(chunk, tensors)
    for path in paths:
        path.unlink()


def _merged(folder: Path, kind: str) -> Moments:
    return merge(moments_in(part, kind) for part in _chunks(folder))


def _file(folder: Path, kind: str, images: range) -> Path:
    return folder / f"{kind}-{images.start:08d}.safetensors"


def _chunks(folder: Path) -> Iterator[dict[str, Tensor]]:
    return (files.read_tensors(path) for path in sorted(folder.glob("chunk-*")))


def _concatenated(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
