"""One file a column: each module here that does not start with `_` holds `METRIC`, and is found by its file name."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from benchmarks import discover
from benchmarks.features import Features
from benchmarks.metrics._frechet import Moments, moments
from benchmarks.record import Value

__all__ = ["Evidence", "Metric", "Moments", "ReferenceStatistics", "Value", "metrics", "reference_statistics"]


@dataclass(frozen=True)
class ReferenceStatistics:
    """What Frechet distances need of a reference set: the moments of its pooled and its spatial features."""

    pooled: Moments
    spatial: Moments

    def to_tensors(self) -> dict[str, Tensor]:
        """Tensors to save; `from_tensors` is the inverse."""
        return {
            f"{name}.{field.name}": torch.as_tensor(getattr(part, field.name))
            for name, part in vars(self).items()
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
                for field in fields(cls)
            }
        )


def reference_statistics(features: Features) -> ReferenceStatistics:
    """The statistics of a reference set; some seconds for ten thousand images, so worth keeping."""
    return ReferenceStatistics(pooled=moments(features.pooled), spatial=moments(features.spatial))


@dataclass(frozen=True)
class Evidence:
    """All that is known of a cell's N images when it is scored.

    `images` are uint8 [N, 3, H, W]; `paired` are those of the full-precision model from the same noise in the same
    order, or None where the cell is itself full precision, and then `paired_features` and `perceptual_distance` [N]
    (see `benchmarks.features`) are None too. `reference_features` come from full-precision samples of other
    seeds, `reference_statistics` are theirs, and `data_statistics` those of the data set. `trajectory_error` [M, T] is
    the relative L2 error of the predicted noise of each image at each of T evaluations, and `temporal_error` [T, P]
    1 - cosine between full-precision and quantised outputs of each time projection; None where not measured.
    `clip_cosines` [N] are those of each image and its prompt, None where the task names no CLIP.

    Raises ValueError for fewer than three images, counts that differ, or a value that is not finite, naming the field.
    """

    images: Tensor
    features: Features
    reference_features: Features
    reference_statistics: ReferenceStatistics
    data_statistics: ReferenceStatistics
    paired: Tensor | None = None
    paired_features: Features | None = None
    perceptual_distance: Tensor | None = None
    trajectory_error: Tensor | None = None
    temporal_error: Tensor | None = None
    clip_cosines: Tensor | None = None

    def __post_init__(self) -> None:
        images = [self.images] if self.paired is None else [self.images, self.paired]
        if any(tensor.dtype != torch.uint8 or tensor.ndim != 4 for tensor in images) or len(self.images) < 3:
            raise ValueError(
                "Scoring takes three or more uint8 images [N, 3, H, W]; got "
                + " and ".join(f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in images)
                + "."
            )
        if len({tensor.shape for tensor in images}) != 1:
            raise ValueError(
                f"Images of shape {tuple(images[0].shape)} cannot be paired with those of {tuple(images[1].shape)}."
            )
        for name in ("features", "paired_features", "perceptual_distance", "clip_cosines"):
            part = getattr(self, name)
            if part is not None and len(part) != len(self.images):
                raise ValueError(f"There are {len(self.images)} images, but {name} has {len(part)} rows.")
        for name, tensor in _tensors(self):
            _check_finite(name, tensor)


@dataclass(frozen=True)
class Metric:
    """One column of the tables.

    `position` orders the columns; the ranking one is first. `label` may hold `{distance}`, `{count}` and `{clip}`,
    which `title` fills in. `better` says which way is better, None for neither. `digits` is the number of decimals
    shown. `compute` returns None where the metric does not apply: those that compare images in pairs do not apply to
    full precision. `per_image` gives the values [N], float64, that the metric is the mean of, or None as `compute`
    does; a metric that is no such mean has none.
    """

    name: str
    position: int
    label: str
    better: Literal["lower", "higher"] | None
    digits: int
    compute: Callable[[Evidence, torch.Generator], Value | None]
    per_image: Callable[[Evidence], Tensor | None] | None = None

    def title(self, distance_label: str, count: int, clip: str = "none") -> str:
        """The column's heading, such as "FD512 to data" for the distance label "FD" and 512 images.

        ``clip`` is the identity of the CLIP that scores.
        """
        short = f"{count // 1000}k" if count >= 10_000 and count % 1000 == 0 else str(count)
        return self.label.format(distance=distance_label, count=short, clip=clip)


def metrics() -> dict[str, Metric]:
    """All metrics by name, in the order of their columns."""
    found = [discover.find(__name__, "metric", name) for name in discover.names(__name__)]
    return {metric.name: metric for metric in sorted(found, key=lambda metric: metric.position)}


def _tensors(part: object, prefix: str = "") -> list[tuple[str, Tensor]]:
    found = []
    for name, value in vars(part).items():
        if isinstance(value, Tensor):
            found.append((f"{prefix}{name}", value))
        elif isinstance(value, Features | ReferenceStatistics | Moments):
            found += _tensors(value, f"{prefix}{name}.")
    return found


def _check_finite(name: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() and not tensor.isfinite().all():
        bad = (~tensor.isfinite()).nonzero()
        raise ValueError(f"{name} holds {len(bad)} values that are not finite, the first at {bad[0].tolist()}.")
