"""reference: what a task's images are compared with.

Features of a data set's images or its published statistics, and features of a large fixed set of full-precision samples
from other seeds than the cells'. What is finished is kept in `.resume/`, under a name that holds the hash of settings,
inputs and code, until all is: a killed run goes on from there.
"""

from __future__ import annotations

import shutil
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.datasets import _published, dataset
from benchmarks.features import Evaluator, Features, concatenate, extract
from benchmarks.features._clip import cosines, load_clip, prompt_vectors
from benchmarks.metrics import References, ReferenceStatistics, reference_statistics
from benchmarks.metrics._manifold import radii_of
from benchmarks.models import Model
from benchmarks.runtime import files, manifest
from benchmarks.runtime.devices import device_of
from benchmarks.runtime.workers import run_all
from benchmarks.stages import _data_features
from benchmarks.stages._data_features import data_of, evaluator_of, moments_in, second_evaluator_of, tensors_of
from benchmarks.stages._setup import (
    batches,
    conditioning_of,
    draw_noise,
    load_model,
    prompt_file,
    sampling_settings,
    task_of,
)
from benchmarks.suite import discover
from benchmarks.suite.params import Suite
from benchmarks.suite.tasks import Task
from tfmq.closure import code_hash

__all__ = ["evaluator_of", "read", "run", "second_evaluator_of"]

FEATURES = "features.safetensors"
STATISTICS = "statistics.safetensors"
DATA_STATISTICS = "data_statistics.safetensors"
DATA_POOLED = "data_pooled.safetensors"
SECOND_DATA = "second_data.safetensors"
# Which evaluators ("identity", "second") saw what: "data" is the data set with its preprocessing or the published file,
# in which case "features" is the data set, if there is one. "clip" is what the task's CLIPs say of real images.
EVALUATOR = "evaluator.json"
PURPOSE = "reference"


def run(suite: Suite, task_name: str, device_name: str, shards: int) -> None:
    """Write what `read` reads. ``shards`` processes share the images.

    Raises ValueError for images, statistics or weights that are missing, damaged or not those of the task.
    """
    task = task_of(suite, task_name)
    device = device_of(device_name)
    torch.set_num_threads(1)
    evaluators = evaluator_of(task, device), second_evaluator_of(task, device)  # before there are workers
    tensors, made_with = {}, {}
    if task.statistics is not None:
        path = Path(task.statistics)
        _published.check_evaluator(path, task.evaluator)
        tensors[DATA_STATISTICS] = _published.read(path).to_tensors()
        made_with["data"] = _published.identity(path)
    unfinished = _unfinished(task, device, evaluators)
    if task.reference_images:
        samples = _features_of_samples(task, device, unfinished, shards)
        tensors |= {FEATURES: vars(samples), STATISTICS: reference_statistics(samples).to_tensors()}
    if task.data is not None:
        found = _data_features.measure(task, device, unfinished, shards)
        tensors.setdefault(DATA_STATISTICS, found.statistics.to_tensors())
        tensors[DATA_POOLED] = {"pooled": found.pooled, "radii": radii_of(found.pooled)}
        if found.second is not None:
            tensors[SECOND_DATA] = tensors_of(found.second, "pooled")
        made_with["features" if task.statistics else "data"] = found.identity
    if task.clip and task.dataset is not None and (found := _clip_of_data(task, device)):
        made_with["clip"] = found
    for cached in (evaluator_of, second_evaluator_of, data_of, _model):
        cached.cache_clear()
    evaluator, second = evaluators
    made_with |= {"identity": evaluator.identity, "second": None if second is None else second.identity}
    with files.new_folder(files.reference(task.name)) as folder:
        files.write_json(folder / EVALUATOR, made_with)
        for name, content in tensors.items():
            files.write_tensors(folder / name, content)
    shutil.rmtree(unfinished)


def read(task: Task, evaluator: Evaluator, second: Evaluator | None = None) -> References:
    """What a task's images are compared with.

    Raises ValueError if it was made with another evaluator or second evaluator, or is missing or damaged.
    """
    folder = files.reference(task.name)
    made_with = files.read_json(folder / EVALUATOR)
    for key, given in (("identity", evaluator), ("second", second)):
        if given is not None and made_with[key] != given.identity:
            raise ValueError(f"{folder} was made with {made_with[key]}, not with {given.identity}: run `dvc repro`")

    def content(name: str, expected: bool) -> dict[str, Tensor] | None:
        return files.read_tensors(folder / name) if expected else None

    samples = content(FEATURES, task.reference_images > 0)
    samples_statistics = content(STATISTICS, task.reference_images > 0)
    data_pooled = content(DATA_POOLED, task.data is not None)
    second_data = content(SECOND_DATA, task.data is not None and task.second_evaluator is not None)
    return References(
        data_statistics=ReferenceStatistics.from_tensors(files.read_tensors(folder / DATA_STATISTICS)),
        samples=None if samples is None else Features(**samples),
        samples_statistics=None if samples_statistics is None else ReferenceStatistics.from_tensors(samples_statistics),
        data_pooled=None if data_pooled is None else data_pooled["pooled"],
        data_radii=None if data_pooled is None else data_pooled["radii"],
        second_data=None if second_data is None else moments_in(second_data, "pooled"),
    )


def _clip_of_data(task: Task, device: torch.device) -> list[dict[str, object]]:
    """What each of the task's CLIPs says of real images and their captions, where any are held out from training."""
    held_out = dataset(task.dataset).held_out
    images, captions = ([], []) if held_out is None else held_out(Path(task.data), task.resolution)
    if not captions:
        return []
    found = []
    for folder in task.clip:
        scorer = load_clip(Path(folder), device)
        score = 100 * cosines(scorer, prompt_vectors(scorer, captions), images).double().mean().item()
        found.append({"clip": scorer.identity, "score": score, "images": len(images)})
    return found


@lru_cache(maxsize=1)
def _model(task: Task, device: torch.device) -> Model:
    return load_model(task, device)


def _unfinished(task: Task, device: torch.device, evaluators: tuple[Evaluator | None, ...]) -> Path:
    """The folder of what is finished of a task, with these inputs and this code; others of the task are removed."""
    inputs = {"evaluators": [evaluator.identity for evaluator in evaluators if evaluator is not None]}
    if task.data is not None:
        inputs["data"] = data_of(task).stamp
    if task.reference_images:
        inputs["checkpoint"] = manifest.verify(Path(task.checkpoint))
        inputs["prompts"] = None if task.prompts is None else files.sha256(prompt_file(task, PURPOSE))
    plugins = {
        discover.FAMILIES: task.family,
        discover.EXTRACTORS: task.evaluator,
        discover.DATASETS: task.dataset,
    }
    entries = [discover.file(package, name) for package, name in plugins.items() if name is not None]
    code = [code_hash(Path(__file__), *entries)]
    code += [version(name) for name in ("torch", "diffusers", "pillow")]
    key = files.fingerprint(task.described(), inputs, str(device), code)
    folder = files.RESUME / PURPOSE / f"{task.name}-{key}"
    for superseded in folder.parent.glob(f"{task.name}-{'[0-9a-f]' * len(key)}"):
        if superseded != folder:
            shutil.rmtree(superseded)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _features_of_samples(task: Task, device: torch.device, folder: Path, shards: int) -> Features:
    """Features of the full-precision samples, with a file in ``folder`` for each generation batch."""
    ranges = batches(task.reference_images, task.batch)
    units = {images: folder / f"samples-{images.start:08d}.safetensors" for images in ranges}
    missing = [unit for unit in units.items() if not unit[1].exists()]
    run_all(missing, partial(_extract, task, device), shards, device)
    return concatenate([Features(**files.read_tensors(path)) for path in units.values()])


def _extract(task: Task, device: torch.device, unit: tuple[range, Path]) -> None:
    images, path = unit
    files.write_tensors(path, vars(extract(evaluator_of(task, device), _sample(task, device, images))))


def _sample(task: Task, device: torch.device, images: range) -> Tensor:
    from tfmq.network.sampling import sample

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
