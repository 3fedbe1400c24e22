"""One file an evaluator: the features that distances are computed on.

Each module here holds `EXTRACTOR`, and is found by its file name. With a weights file it becomes an `Evaluator`, whose
`identity` says which features a number was computed on; numbers of different identities are not comparable.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.suite import discover

__all__ = [
    "Evaluator",
    "Extractor",
    "Features",
    "compare",
    "concatenate",
    "extract",
    "extract_with_maps",
    "extractor",
    "load_evaluator",
    "perceptual_distance",
    "resize",
    "unit_maps",
]


@dataclass(frozen=True)
class Features:
    """What an evaluator sees in N images; float32 on the CPU, one row an image.

    `pooled` [N, D] is the last feature map averaged over positions (Frechet and kernel distances), `spatial` [N, S] a
    few channels of a middle feature map with their positions, flattened channels last (the spatial distance, after
    sFID), `logits` [N, C] the class scores before the softmax.
    """

    pooled: Tensor
    spatial: Tensor
    logits: Tensor

    def __post_init__(self) -> None:
        shapes = {name: tuple(tensor.shape) for name, tensor in vars(self).items()}
        if any(len(shape) != 2 for shape in shapes.values()) or len({shape[0] for shape in shapes.values()}) != 1:
            raise ValueError(f"Features need one row an image in every field; got the shapes {shapes}.")

    def __len__(self) -> int:
        return len(self.pooled)


@dataclass(frozen=True)
class Extractor:
    """A feature network without its weights.

    `version` rises when anything that moves a number changes: layers, resize, normalisation, dtype or batch.
    `resolution` is the side in pixels that images are resized to. `batch` is fixed, because features change with it in
    the last bits. `distance_label` is "FID" for the FID Inception network behind torch-fidelity's resize, "clean FID"
    behind clean-fid's, and "FD" for every other network. `weights` names the folder that holds the weights:
    extractors that differ in their resize alone share one. `keeps_maps` says whether the `unit_maps` of full-precision
    images are kept on disk for the cells that are compared with them; where they are too large for that, those images
    are evaluated again beside every cell, with equal results.

    `load(path)` reads a weights file and returns a module that maps uint8 images [B, 3, H, W] to their `Features` and a
    tuple of feature maps [B, C, h, w] from shallow to deep, in one forward pass.
    """

    name: str
    version: int
    resolution: int
    batch: int
    distance_label: str
    weights: str
    keeps_maps: bool
    load: Callable[[Path], torch.nn.Module]


@dataclass(frozen=True)
class Evaluator:
    """An extractor with its weights, on a device."""

    extractor: Extractor
    weights_sha256: str
    device: torch.device
    network: torch.nn.Module

    @property
    def identity(self) -> str:
        """Name, version, resize and weights, as in `efficientnet_lite0@1-224px-57934424`."""
        return f"{self.extractor.name}@{self.extractor.version}-{self.extractor.resolution}px-{self.weights_sha256[:8]}"


def extractor(name: str) -> Extractor:
    """The extractor of the file of that name; a ValueError names the nearest if there is none."""
    return discover.find(__name__, "extractor", name)


def load_evaluator(name: str, weights: Path, device: torch.device | None = None) -> Evaluator:
    """The extractor `name` with the weights of that file, on `device` (the CPU unless given).

    Raises ValueError for an unknown name or weights that do not fit, FileNotFoundError for a missing file.
    """
    found = extractor(name)
    with open(weights, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    device = device or torch.device("cpu")
    return Evaluator(found, digest, device, found.load(weights).eval().requires_grad_(False).to(device))


def extract(evaluator: Evaluator, images: Tensor) -> Features:
    """Features of uint8 images [N, 3, H, W], in batches of the extractor's own size."""
    _check_images(images)
    return concatenate([features for features, _ in _passes(evaluator, images)])


def extract_with_maps(evaluator: Evaluator, images: Tensor) -> tuple[Features, tuple[Tensor, ...]]:
    """What `extract` gives, and the `unit_maps` of all images on the CPU: some hundred kB an image."""
    _check_images(images)
    parts, maps = zip(*((part, unit_maps(maps)) for part, maps in _passes(evaluator, images)), strict=True)
    return concatenate(list(parts)), tuple(torch.cat(layer).cpu() for layer in zip(*maps, strict=True))


def compare(evaluator: Evaluator, images: Tensor, paired_maps: Sequence[Tensor]) -> tuple[Features, Tensor]:
    """Features of uint8 images [N, 3, H, W], and the perceptual distance [N] of each to the image it is paired with.

    ``paired_maps`` are the `unit_maps` of these images, N rows each. Raises ValueError for another count.
    """
    _check_images(images)
    counts = {len(layer) for layer in paired_maps}
    if counts != {len(images)}:
        raise ValueError(f"{len(images)} images are compared in pairs, but the maps have {sorted(counts)} rows.")
    parts, distances, start = [], [], 0
    for part, maps in _passes(evaluator, images):
        rows = slice(start, start + len(maps[0]))
        paired = tuple(layer[rows].to(evaluator.device) for layer in paired_maps)
        parts.append(part)
        distances.append(perceptual_distance(unit_maps(maps), paired).cpu())
        start = rows.stop
    return concatenate(parts), torch.cat(distances)


def unit_maps(maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Feature maps [B, C, h, w] with the channels at each position scaled to unit length, in half precision to be kept.

    Rounding moves a perceptual distance by less than a thousandth of its value, and equal images stay at distance 0.
    """
    return tuple(functional.normalize(layer, dim=1).half() for layer in maps)


def perceptual_distance(maps: tuple[Tensor, ...], paired_maps: tuple[Tensor, ...]) -> Tensor:
    """Distance [B] of image pairs from their `unit_maps` [B, C, h, w]: 0 for equal images, at most 4.

    The squared differences are summed over channels, averaged over positions, then over maps. This is LPIPS (Zhang et
    al., 2018, arXiv:1801.03924, eq. 1) with all channel weights one and the evaluator's own network: without LPIPS'
    learned weights its values are not LPIPS values.
    """
    layers = [
        (a.float() - b.float()).square().sum(dim=1).mean(dim=(1, 2)) for a, b in zip(maps, paired_maps, strict=True)
    ]
    return torch.stack(layers).mean(dim=0)


def concatenate(parts: list[Features]) -> Features:
    """The features of several sets of images as of one set, in their order."""
    return Features(
        pooled=torch.cat([part.pooled for part in parts]),
        spatial=torch.cat([part.spatial for part in parts]),
        logits=torch.cat([part.logits for part in parts]),
    )


def resize(images: Tensor, size: int) -> Tensor:
    """Float32 images of size x size pixels, from uint8 images [B, 3, H, W]: bilinear, antialiased, values 0 to 255."""
    return functional.interpolate(images.float(), size=(size, size), mode="bilinear", antialias=True)


def _passes(evaluator: Evaluator, images: Tensor) -> Iterator[tuple[Features, tuple[Tensor, ...]]]:
    for batch in images.split(evaluator.extractor.batch):
        with torch.inference_mode():
            features, maps = evaluator.network(batch.to(evaluator.device))
        yield Features(features.pooled.cpu(), features.spatial.cpu(), features.logits.cpu()), maps


def _check_images(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or len(images) == 0:
        raise ValueError(
            f"An evaluator takes uint8 images of shape [N, 3, H, W]; got {images.dtype} {tuple(images.shape)}."
        )
