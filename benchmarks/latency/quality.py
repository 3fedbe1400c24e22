"""What an engine costs in quality: errors of the predicted noise, and distances of images to full precision's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor
from torch.nn import functional

from benchmarks.features import extract
from benchmarks.latency import Evaluate
from benchmarks.metrics._interval import mean_with_interval
from benchmarks.models import Model
from benchmarks.stages._data_features import evaluator_of
from benchmarks.stages._setup import conditioning_of, draw_noise, sampling_settings
from benchmarks.suite.record import Value
from tfmq.network.backbone import Network, evaluate
from tfmq.network.calibration import CalibrationSet
from tfmq.network.rows import CalibrationRows
from tfmq.network.sampling import sample

if TYPE_CHECKING:
    from benchmarks.suite.sections import Deployment
    from benchmarks.suite.tasks import Task

By = Mapping[str, tuple[str, Evaluate]]


@dataclass(frozen=True)
class Quality:
    """Images of an engine beside those of full precision from the same noise.

    Attributes:
        feature_distance: mean of 1 - cosine of features; None for full precision itself.
        simulated_feature_distance: the same where the quantised network is simulated; None where it was not.
        difference: mean over images of the first less the second.
    """

    feature_distance: Value
    simulated_feature_distance: Value | None = None
    difference: Value | None = None


class InPlace:
    """An engine in the place of a network, for `tfmq.sample`."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, network: Network, run: Evaluate, batch: int) -> None:
        self.config, self.stands_for = network.config, type(network).__name__
        self.run, self.batch = run, batch

    def parameters(self) -> Iterator[Tensor]:
        """None of torch's."""
        return iter(())

    def __call__(
        self,
        latents: Tensor,
        step: Tensor | None = None,
        condition: Tensor | None = None,
        *,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
    ) -> UNet2DOutput:
        """The predicted noise, so many rows at a time as the engine was made for."""
        at = (step if timestep is None else timestep).reshape(-1)[:1]
        given = class_labels if condition is None else condition
        parts = []
        for start in range(0, len(latents), self.batch):
            rows = slice(start, start + self.batch)
            parts.append(self.run(latents[rows], at, None if given is None else given[rows]))
        return UNet2DOutput(sample=torch.cat(parts))


@torch.no_grad()
def errors(
    full: Network, quantized: Mapping[str, Network], by: By, rows: CalibrationRows, batch: int
) -> dict[str, dict[str, float]]:
    """Relative errors of the predicted noise, means over time steps, of each engine.

    ``error`` is to full precision, ``simulated_error`` that of the simulated network, and ``executed_to_simulated`` the
    difference of the two.
    """
    found: dict[str, dict[str, list[float]]] = {name: {} for name in by}
    for step in rows.timesteps.unique():
        part = rows[(rows.timesteps == step).nonzero().flatten()[:batch]]
        given = part.latents, step, part.context
        exact = evaluate(full, *given)
        simulated = {precision: evaluate(network, *given) for precision, network in quantized.items()}
        for name, (precision, run) in by.items():
            values, output = found[name], run(part.latents, step.reshape(1), part.context)
            values.setdefault("error", []).append(_relative(output, exact))
            if precision in simulated and not name.startswith("nncf"):
                values.setdefault("simulated_error", []).append(_relative(simulated[precision], exact))
                values.setdefault("executed_to_simulated", []).append(_relative(output, simulated[precision]))
    return {name: {key: sum(all_) / len(all_) for key, all_ in values.items()} for name, values in found.items()}


def qualities(
    task: Task, model: Model, held_out: CalibrationSet, quantized: Mapping[str, Network], by: By, wanted: Deployment
) -> dict[str, Quality]:
    """Images of every engine and of the simulated networks, from the noise of the full-precision images."""
    device = torch.device("cpu")
    evaluator = evaluator_of(task, device)
    reference = extract(evaluator, model.decode(held_out.samples)).pooled.double()

    def distances(network: object) -> Tensor:
        images = range(wanted.images)
        noise, step_noise = draw_noise(task, "sample", 0, images, model.latent_shape)
        latents = sample(
            network,
            model.scheduler,
            noise,
            sampling_settings(task),
            conditioning=conditioning_of(model, task, "sample", images),
            step_noise=step_noise,
        )
        seen = extract(evaluator, model.decode(latents)).pooled.double()
        return (1 - functional.cosine_similarity(seen, reference, dim=1)).clamp(min=0)

    def value(values: Tensor) -> Value:
        return mean_with_interval(values, torch.Generator().manual_seed(0))

    simulated = {precision: distances(network) for precision, network in quantized.items()}
    found = {}
    for name, (precision, run) in by.items():
        own = distances(InPlace(model.unet, run, wanted.batch))
        other = None if name.startswith("nncf") else simulated.get(precision)
        if other is None:
            found[name] = Quality(value(own))
        else:
            found[name] = Quality(value(own), value(other), value(own - other))
    return found


def _relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()
