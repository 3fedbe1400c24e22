"""One file a column: each module here that does not start with `_` holds `METRIC`, and is found by its file name."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from benchmarks.features import Features
from benchmarks.metrics._frechet import Moments, moments
from benchmarks.suite import discover
from benchmarks.suite.record import Value

__all__ = [
    "Evidence",
    "Metric",
    "Moments",
    "ReferenceStatistics",
    "References",
    "Value",
    "metrics",
    "reference_statistics",
]


@dataclass(frozen=True)
class ReferenceStatistics:
    """What Frechet distances need of a reference set: the moments of its pooled and its spatial features.

    `spatial` is None for published statistics that have none.
    """

    pooled: Moments
    spatial: Moments | None

    def to_tensors(self) -> dict[str, Tensor]:
        """Tensors to save; `from_tensors` is the inverse."""
        return {
            f"{name}.{field.name}": torch.as_tensor(getattr(part, field.name))
            for name, part in vars(self).items()
            if part is not None
            for field in fields(part)
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "ReferenceStatistics":
        """The statistics that `to_tensors` made these of."""
        return cls(
            **{
                field.name: Moments(
                    mean=tensors[f"{field.name}.mean"],
                    covariance=tensors[f"{field.name}.covariance"],
                    count=int(tensors[f"{field.name}.count"]),
                )
                if f"{field.name}.mean" in tensors
                else None
                for field in fields(cls)
            }
        )


def reference_statistics(features: Features) -> ReferenceStatistics:
    """The statistics of a reference set; some seconds for ten thousand images, so worth keeping."""
    return ReferenceStatistics(pooled=moments(features.pooled), spatial=moments(features.spatial))


@dataclass(frozen=True)
class References:
    """What a task's images are compared with.

    `data_statistics` are those of the data set, and `data_pooled` [M, D] the pooled features of its images, None where
    only published moments are known; `data_radii` [M] are those of `_manifold.radii_of` these features, None where they
    are to be computed when they are needed. `samples` are the features of full-precision samples of other seeds, with
    `samples_statistics`; both are None where a task asks for none. `second_data` are the moments of the data set's
    pooled features by the task's second evaluator, None where it has none.
    """

    data_statistics: ReferenceStatistics
    samples: Features | None = None
    samples_statistics: ReferenceStatistics | None = None
    data_pooled: Tensor | None = None
    data_radii: Tensor | None = None
    second_data: Moments | None = None


@dataclass(frozen=True)
class Evidence:
    """All that is known of a cell's N images when it is scored; the images themselves are not kept.

    `features` are those of the task's evaluator, `second_features` [N, D] the pooled ones of its second evaluator, None
    where it has none. `paired_features` are those of the full-precision model's images from the same noise in the same
    order, and `squared_error` [N] (mean over an image's values of 0 to 255) and `perceptual_distance` [N] (see
    `benchmarks.features`) compare with these images; all three are None where the cell is itself full precision.
    `trajectory_error` [M, T] is the relative L2 error of the predicted noise of each image at each of T evaluations,
    and `temporal_error` [T, P] 1 - cosine between full-precision and quantised outputs of each time projection; None
    where not measured. `clip_cosines` [K, N] are those of each image and its prompt by each of the task's K CLIPs, None
    where the task names no CLIP.

    Raises ValueError for fewer than three images, counts that differ, or a value that is not finite, naming the field.
    """

    features: Features
    references: References
    paired_features: Features | None = None
    squared_error: Tensor | None = None
    perceptual_distance: Tensor | None = None
    trajectory_error: Tensor | None = None
    temporal_error: Tensor | None = None
    clip_cosines: Tensor | None = None
    second_features: Tensor | None = None

    def __post_init__(self) -> None:
        count = len(self.features)
        if count < 3:
            raise ValueError(f"Scoring takes three or more images; got {count}.")
        for name in ("paired_features", "squared_error", "perceptual_distance", "second_features"):
            part = getattr(self, name)
            if part is not None and len(part) != count:
                raise ValueError(f"There are {count} images, but {name} has {len(part)} rows.")
        if self.clip_cosines is not None and self.clip_cosines.shape[1:] != (count,):
            shape = tuple(self.clip_cosines.shape)
            raise ValueError(f"There are {count} images, but clip_cosines has the shape {shape}.")
        for name, tensor in _tensors(self):
            _check_finite(name, tensor)


@dataclass(frozen=True)
class Metric:
    """One column of the tables.

    `position` orders the columns; the ranking one is first. `label` may hold `{distance}`, `{count}`, `{second}` and
    `{clips[0]}` or `{clips[1]}`, which `title` fills in. `better` says which way is better, None for neither. `digits`
    is the number of decimals shown. `compute` returns None where the metric does not apply. `per_image` gives the
    values [N], float64, that the metric is the mean of, or None as `compute` does; a metric that is no such mean has
    none. A `paired` metric compares a cell with full precision image by image, and does not apply to full precision.
    """

    name: str
    position: int
    label: str
    better: Literal["lower", "higher"] | None
    digits: int
    compute: Callable[[Evidence, torch.Generator], Value | None]
    per_image: Callable[[Evidence], Tensor | None] | None = None
    paired: bool = False

    def title(self, distance_label: str, count: int, clips: Sequence[str] = (), second_label: str = "clean FID") -> str:
        """The column's heading, such as "FD512 to data" for the distance label "FD" and 512 images.

        ``clips`` are the identities of the CLIPs that score, in the task's order, and ``second_label`` is the distance
        label of the second evaluator.
        """
        short = f"{count // 1000}k" if count >= 10_000 and count % 1000 == 0 else str(count)
        named = [*clips, "none", "none"]
        return self.label.format(distance=distance_label, count=short, clips=named, second=second_label)


def metrics() -> dict[str, Metric]:
    """All metrics by name, in the order of their columns."""
    found = [discover.find(__name__, "metric", name) for name in discover.names(__name__)]
    return {metric.name: metric for metric in sorted(found, key=lambda metric: metric.position)}


def _tensors(part: object, prefix: str = "") -> list[tuple[str, Tensor]]:
    found = []
    for name, value in vars(part).items():
        if isinstance(value, Tensor):
            found.append((f"{prefix}{name}", value))
        elif isinstance(value, Features | References | ReferenceStatistics | Moments):
            found += _tensors(value, f"{prefix}{name}.")
    return found


def _check_finite(name: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() and not tensor.isfinite().all():
        bad = (~tensor.isfinite()).nonzero()
        raise ValueError(f"{name} holds {len(bad)} values that are not finite, the first at {bad[0].tolist()}.")
