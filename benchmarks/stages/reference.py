"""reference: features that a task's cells are compared with.

Those of the data set, and of a large fixed set of full-precision samples from other seeds than the cells'.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import manifest
from benchmarks.features import Evaluator, Features, extract, load_evaluator
from benchmarks.metrics import ReferenceStatistics, reference_statistics
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

FEATURES = "features.safetensors"
STATISTICS = "statistics.safetensors"
DATA_STATISTICS = "data_statistics.safetensors"
EVALUATOR = "evaluator.json"
EVALUATORS = Path("data")


def run(suite: Suite, task_name: str, device_name: str) -> None:
    """Write the features of the full-precision samples, and the moments of these and of the data set."""
    task = task_of(suite, task_name)
    device = device_of(device_name)
    torch.set_num_threads(suite.threads)
    evaluator = evaluator_of(task, device)
    features = extract(evaluator, _sample_reference(task, device))
    data = extract(evaluator, load_images(Path(task.data), task.resolution)[: task.data_images])
    with files.new_folder(files.reference(task.name)) as folder:
        files.write_json(folder / EVALUATOR, {"identity": evaluator.identity})
        files.write_tensors(folder / FEATURES, vars(features))
        files.write_tensors(folder / STATISTICS, reference_statistics(features).to_tensors())
        files.write_tensors(folder / DATA_STATISTICS, reference_statistics(data).to_tensors())


def evaluator_of(task: Task, device: torch.device) -> Evaluator:
    """The task's evaluator with the weights that data.dvc brings."""
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


def _sample_reference(task: Task, device: torch.device) -> torch.Tensor:
    from tfmq.sampling import sample

    model = load_model(task, device)
    images = []
    for batch in tqdm(batches(task.reference_images, task.batch), desc="reference samples", disable=None):
        noise, step_noise = draw_noise(task, "reference", 0, batch, model.latent_shape)
        latents = sample(
            model.unet,
            model.scheduler,
            noise.to(device),
            sampling_settings(task),
            conditioning=conditioning_of(model, batch),
            step_noise=step_noise.to(device),
        )
        images.append(model.decode(latents))
    return torch.cat(images)
