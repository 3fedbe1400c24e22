"""Temporal features: which time step each is nearest to, and sampling in full precision with those that are given."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.models import Model
from benchmarks.stages._setup import conditioning_of, draw_noise, sampling_settings
from benchmarks.suite.tasks import Task
from tfmq.modules.cache import CachePlan, cached_projections, insert_cache
from tfmq.network.backbone import Backbone
from tfmq.network.sampling import Step, sample
from tfmq.numerics.steps import exact_steps
from tfmq.plan import QuantizationPlan, insert_quantizers
from tfmq.precision import FULL

PURPOSE = "sample"


def sampled_steps(model: Model, task: Task) -> Tensor:
    """The time steps (S,) of a task's schedule, in ascending order, each once."""
    scheduler = copy.deepcopy(model.scheduler)
    scheduler.set_timesteps(task.steps)
    return exact_steps(scheduler.timesteps).unique()


def nearest_steps(features: Tensor, steps: Tensor, candidates: Tensor, known: Tensor) -> Tensor:
    """Which time step each feature is taken for: (S,), of those whose full-precision feature has the largest cosine.

    Args:
        features: (S, C), of ``steps`` (S,).
        candidates: (K, C), full-precision features of the time steps ``known`` (K,), which are in ascending order and
            hold all of ``steps``.

    Where others are no nearer, a feature is taken for its own step.
    """
    cosines = F.normalize(features.double(), dim=1) @ F.normalize(candidates.double(), dim=1).T
    own = torch.searchsorted(known, steps).to(cosines.device)
    largest, found = cosines.max(1)
    is_own = cosines.gather(1, own[:, None])[:, 0] >= largest
    return known[torch.where(is_own, own, found).cpu()]


def relative_error(features: Tensor, exact: Tensor) -> Tensor:
    """Relative L2 error (S,) of features (S, C)."""
    return (features - exact).double().norm(dim=1) / exact.double().norm(dim=1)


class TabledSampling:
    """Sampling of some images in full precision, where temporal features are looked up in tables.

    The network of ``model`` computes no temporal features of its own from then on.
    """

    def __init__(self, model: Model, task: Task, backbone: Backbone, steps: Tensor, images: int) -> None:
        self.model, self.task, self.images, self._paths = model, task, range(images), backbone.time_projections
        network = model.unet
        insert_quantizers(network, QuantizationPlan({}, {})).steps = steps
        insert_cache(network, dict.fromkeys(self._paths, CachePlan(FULL, keeps_layer=False)), backbone)

    def latents(self, features: Sequence[Tensor]) -> Tensor:
        """Latents after each evaluation (evaluations, N, C, H, W), for features (S, C_i) of each projection."""
        tables = cached_projections(self.model.unet)
        for path, table in zip(self._paths, features, strict=True):
            tables[path].store(table)
        noise, step_noise = draw_noise(self.task, PURPOSE, 0, self.images, self.model.latent_shape)
        steps: list[Step] = []
        last = sample(
            self.model.unet,
            self.model.scheduler,
            noise,
            sampling_settings(self.task),
            conditioning=conditioning_of(self.model, self.task, PURPOSE, self.images),
            step_noise=step_noise,
            callback=steps.append,
        )
        return torch.stack([*(step.latents for step in steps[1:]), last])
