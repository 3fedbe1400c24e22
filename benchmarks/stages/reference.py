"""reference: features that a task's cells are compared with.

Those of the data set, and of a large fixed set of full-precision samples from other seeds than the cells'.
"""

from __future__ import annotations

from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from benchmarks import manifest
from benchmarks.features import Evaluator, Features, concatenate, extract, load_evaluator
from benchmarks.metrics import ReferenceStatistics, reference_statistics
from benchmarks.models import Model
from benchmarks.params import Suite, Task
from benchmarks.small.data import load_images
from benchmarks.stages import files
from benchmarks.stages.setup import (
    batches,
    conditioning_of,
    device_of,
    draw_noise,
    load_model,
    sampling_settings,
    task_of,
)
from benchmarks.stages.workers import run_all

FEATURES = "features.safetensors"
STATISTICS = "statistics.safetensors"
DATA_STATISTICS = "data_statistics.safetensors"
EVALUATOR = "evaluator.json"
EVALUATORS = Path("data")
PURPOSE = "reference"
SAMPLES, DATA = "samples", "data"


def run(suite: Suite, task_name: str, device_name: str, shards: int) -> None:
    """Write the features of the full-precision samples, and the moments of these and of the data set.

    ``shards`` processes share the generation batches and as large parts of the data set.
    """
    task = task_of(suite, task_name)
    device = device_of(device_name)
    torch.set_num_threads(1)
    evaluator = evaluator_of(task, device)  # before there are workers, which then have it too
    counts = {SAMPLES: task.reference_images, DATA: len(_data(task))}
    units = [(kind, images) for kind, count in counts.items() for images in batches(count, task.batch)]
    with TemporaryDirectory() as parts:
        run_all(units, partial(_extract, task, device, Path(parts)), shards, device)
        features, data = (_together(Path(parts), kind) for kind in counts)
    for cached in (evaluator_of, _data, _model):
        cached.cache_clear()
    with files.new_folder(files.reference(task.name)) as folder:
        files.write_json(folder / EVALUATOR, {"identity": evaluator.identity})
        files.write_tensors(folder / FEATURES, vars(features))
        files.write_tensors(folder / STATISTICS, reference_statistics(features).to_tensors())
        files.write_tensors(folder / DATA_STATISTICS, reference_statistics(data).to_tensors())


@lru_cache(maxsize=1)
def evaluator_of(task: Task, device: torch.device) -> Evaluator:
    """The task's evaluator with the weights that data.dvc brings; the last one stays loaded."""
    folder = EVALUATORS / task.evaluator.replace("_", "-")
    manifest.verify(folder)
    return load_evaluator(task.evaluator, folder / "model.safetensors", device)


def read(task: Task, evaluator: Evaluator) -> tuple[Features, ReferenceStatistics, ReferenceStatistics]:
    """Features of the full-precision reference, its statistics, and those of the data set.

    Raises ValueError if they were made with another evaluator.
    """
    folder = files.reference(task.name)
    made_with = files.read_json(folder / EVALUATOR)["identity"]
    if made_with != evaluator.identity:
        raise ValueError(f"{folder} was made with {made_with}, not with {evaluator.identity}: run `dvc repro`")
    features = Features(**files.read_tensors(folder / FEATURES))
    own = ReferenceStatistics.from_tensors(files.read_tensors(folder / STATISTICS))
    data = ReferenceStatistics.from_tensors(files.read_tensors(folder / DATA_STATISTICS))
    return features, own, data


@lru_cache(maxsize=1)
def _data(task: Task) -> Tensor:
    return load_images(Path(task.data), task.resolution)[: task.data_images]


@lru_cache(maxsize=1)
def _model(task: Task, device: torch.device) -> Model:
    return load_model(task, device)


def _extract(task: Task, device: torch.device, folder: Path, unit: tuple[str, range]) -> None:
    """Write the features of some full-precision samples or images of the data set."""
    kind, images = unit
    pixels = _sample(task, device, images) if kind == SAMPLES else _data(task)[images.start : images.stop]
    features = extract(evaluator_of(task, device), pixels)
    files.write_tensors(folder / f"{kind}-{images.start:08d}.safetensors", vars(features))


def _sample(task: Task, device: torch.device, images: range) -> Tensor:
    from tfmq.sampling import sample

    model = _model(task, device)
    noise, step_noise = draw_noise(task, PURPOSE, 0, images, model.latent_shape)
    latents = sample(
        model.unet,
        model.scheduler,
        noise.to(device),
        sampling_settings(task),
        conditioning=conditioning_of(model, task, PURPOSE, images),
        step_noise=step_noise.to(device),
    )
    return model.decode(latents)


def _together(folder: Path, kind: str) -> Features:
    return concatenate([Features(**files.read_tensors(path)) for path in sorted(folder.glob(f"{kind}-*"))])
