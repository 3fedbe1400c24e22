"""temporal: what quantisation does to the signal of the time step, and what that alone does to sampling.

Two analyses of TFMQ-DM (Huang et al., CVPR 2024, arXiv 2311.16503), for each quantised network of a task. *Mismatch*:
each temporal feature at each sampled step is compared with the full-precision ones of all time steps of training; the
nearest should be its own. *Deviation*: images are sampled with the temporal features of the quantised network and all
else in full precision. Features depend on the time step alone, so that the first needs no images, and networks of equal
features share the second.
"""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from benchmarks.metrics._interval import mean_with_interval
from benchmarks.runtime import environment, files
from benchmarks.stages._setup import load_model, task_of
from benchmarks.stages._temporal_features import TabledSampling, nearest_steps, relative_error, sampled_steps
from benchmarks.suite.params import Suite
from benchmarks.suite.record import Cell
from benchmarks.suite.tasks import Task
from tfmq.checkpoint import load_quantized
from tfmq.network.backbone import backbone_of
from tfmq.plan import announce_step

FOLDER = files.RESULTS / "temporal"
NO_FEATURES = (
    "Not applicable: nothing in this network depends on the time step alone, since a condition goes into the first"
    " layer of its time embedding."
)
CLASS_IS_ADDED = (
    "The class is added to these features; the layers behind, which depend on both, are in full precision where latents"
    " are followed."
)


def run(suite: Suite, task_name: str) -> str:
    """Look at all quantised networks of one task; writes ``results/temporal`` and returns what to run next.

    A cell without a checkpoint is shown as not applicable or as failed. Raises ValueError for a task that is not under
    ``temporal`` of params.yaml.
    """
    task, wanted = task_of(suite, task_name), suite.temporal
    if wanted is None or task.name not in wanted.tasks:
        known = ", ".join(wanted.tasks) if wanted else "none"
        raise ValueError(f"{task.name} is none of the tasks under `temporal` of params.yaml, which are {known}")
    torch.set_num_threads(1)
    cells, found = suite.temporal_cells(task.name), describe(task, wanted.images)
    if found["projections"]:
        analysis = _Analysis(task, wanted.images)
        found["rows"] = [analysis.row(cell) for cell in tqdm(cells, desc=task.name, unit="cell")]
    path = FOLDER / f"{task.name}.json"
    files.write_json(path, found)
    return f"{path} is written; `python -m benchmarks tables` makes a page of it"


def describe(task: Task, images: int) -> dict[str, object]:
    """What is compared, without any row."""
    model = load_model(task, torch.device("cpu"))
    backbone = backbone_of(model.unet)
    note = CLASS_IS_ADDED if backbone.condition == "class" else ""
    return {
        "task": task.name,
        "images": images,
        "projections": list(backbone.time_projections),
        "note": note if backbone.time_projections else NO_FEATURES,
        "steps": sampled_steps(model, task).tolist(),
        "training_steps": model.scheduler.config.num_train_timesteps,
        "environment": environment.describe(),
        "rows": [],
    }


class _Analysis:
    """A task's full-precision features and latents, which those of quantised networks are compared with."""

    @torch.no_grad()
    def __init__(self, task: Task, images: int) -> None:
        model = load_model(task, torch.device("cpu"))
        self.full, self.backbone = model.unet, backbone_of(model.unet)
        self.steps = sampled_steps(model, task)
        self.known = torch.cat([torch.arange(model.scheduler.config.num_train_timesteps), self.steps]).unique()
        self.candidates = self.backbone.temporal_features(self.full, self.known)
        self.exact = self.backbone.temporal_features(self.full, self.steps)
        self._sampling = TabledSampling(load_model(task, torch.device("cpu")), task, self.backbone, self.steps, images)
        self._latents = self._sampling.latents(self.exact)
        self._deviations = {_key(self.exact): torch.zeros(self._latents.shape[:2])}

    @torch.no_grad()
    def row(self, cell: Cell) -> dict[str, object]:
        """What is found of one cell."""
        described = {"method": cell.method, "precision": cell.precision}
        folder = files.cell_folder(cell)
        if not (folder / files.QUANTIZED).is_file():
            return described | _absence(folder)
        with warnings.catch_warnings(action="ignore"):  # of PTQD's noise correction, which is not looked at
            network = load_quantized(folder / files.QUANTIZED)
        announce_step(network, self.steps)
        features = self.backbone.temporal_features(network, self.steps)
        found = self._mismatch(features) | self._deviation(features)
        return described | {"status": "measured", "reason": "", **found}

    def _mismatch(self, features: list[Tensor]) -> dict[str, object]:
        """Which time steps the features (S, C_i) are nearest to, and their errors, over steps and projections."""
        pairs = [*zip(features, self.candidates, strict=True)]
        nearest = [nearest_steps(quantized, self.steps, known, self.known) for quantized, known in pairs]
        shifts = torch.stack(nearest, 1) - self.steps[:, None]
        cosines = [F.cosine_similarity(q.double(), e.double()) for q, e in zip(features, self.exact, strict=True)]
        errors = [relative_error(q, e) for q, e in zip(features, self.exact, strict=True)]
        return {
            "temporal_error": 1 - torch.stack(cosines).mean().item(),
            "relative_error": torch.stack(errors).mean().item(),
            "mistaken": (shifts != 0).double().mean().item(),
            "mean_shift": shifts.abs().double().mean().item(),
            "largest_shift": shifts.abs().max().item(),
            "shifts": {
                str(step): {str(shift): count for shift, count in sorted(Counter(row).items())}
                for step, row in zip(self.steps.tolist(), shifts.tolist(), strict=True)
            },
        }

    def _deviation(self, features: list[Tensor]) -> dict[str, object]:
        """How far latents are from full precision's, relative, after each evaluation and at the end."""
        key = _key(features)
        if key not in self._deviations:
            difference = self._sampling.latents(features) - self._latents
            self._deviations[key] = difference.flatten(2).norm(dim=2) / self._latents.flatten(2).norm(dim=2)
        found = self._deviations[key].double()
        quartiles = found.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64), dim=1)
        return {
            "exact": key == _key(self.exact),
            "deviation": dict(zip(("lower_quartile", "median", "upper_quartile"), quartiles.tolist(), strict=True)),
            "final_mean": dataclasses.asdict(mean_with_interval(found[-1], torch.Generator().manual_seed(0))),
        }


def _key(features: list[Tensor]) -> str:
    """The same for equal features, to the bit."""
    return hashlib.sha256(b"".join(each.contiguous().numpy().tobytes() for each in features)).hexdigest()


def _absence(folder: Path) -> dict[str, str]:
    """Why there is no checkpoint in a cell's folder."""
    path = folder / files.OUTCOME
    if not path.is_file():
        return {"status": "failed", "reason": "no quantised network; run `dvc repro`"}
    outcome = files.read_json(path)
    return {"status": outcome["status"], "reason": outcome["reason"]}
