"""Published statistics of data sets: means and covariances of FID Inception features in a numpy archive (`.npz`).

Two makes are read:
- clean-fid (Parmar et al., 2022): `mu` [2048] and `sigma` [2048, 2048]; no spatial features.
- ADM's reference batches (Dhariwal and Nichol, 2021), of the whole training set: besides these `mu_s` [2023] and
  `sigma_s` [2023, 2023] of the spatial features, flattened channels last as everywhere here. Their 10,000 images
  (`arr_0`) belong to other numbers, ADM's precision and recall, and are not read.

The files do not say how many images they were made of. Where their makers do, the count stands here; else it is 0.
"""

from __future__ import annotations

import re
import struct
import zipfile
import zlib
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.metrics import Moments, ReferenceStatistics
from benchmarks.runtime import manifest

POOLED, SPATIAL = 2048, 2023
TENSORFLOW, CLEAN = "inception", "inception_clean"
ADVICE = "download it again, or give another file of published statistics"
# What a damaged archive may raise. ValueError is also for pickled objects, which are never read.
ZIP = (zipfile.BadZipFile, zlib.error, struct.error)
BROKEN = (*ZIP, EOFError, OSError, KeyError, ValueError, MemoryError, RuntimeError)
# Of the largest value: what rounding to float32 leaves of asymmetry, and of eigenvalues below zero.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Known:
    """What is known of files by their names: the evaluator they go with (or why there is none), and their images."""

    names: str
    evaluator: str
    count: int = 0


KNOWN = (
    Known(r"VIRTUAL_imagenet(64|128|256)_labeled|VIRTUAL_imagenet512", TENSORFLOW, 1_281_167),
    Known(r"VIRTUAL_lsun_bedroom256", TENSORFLOW, 3_033_042),
    Known(r"ffhq_clean_trainval70k_(256|1024)", CLEAN, 70_000),
    Known(r"ffhq_legacy_tensorflow_trainval70k_(256|1024)", TENSORFLOW, 70_000),
    Known(r"lsun_church_clean_trainfull_256", CLEAN, 126_227),
    Known(r"(cifar10|ffhq|lsun_church)_clean_(train|trainval)_\d+", CLEAN, 50_000),
    Known(r"(cifar10|ffhq|lsun_church)_legacy_tensorflow_(train|trainval)_\d+", TENSORFLOW, 50_000),
    Known(r"VIRTUAL_\w+|\w+_legacy_tensorflow_\w+", TENSORFLOW),
    Known(r"\w+_clean_\w+", CLEAN),
    Known(r"\w+_legacy_pytorch_\w+", "pytorch-fid's resize, which no evaluator here has"),
)


def read(path: Path) -> ReferenceStatistics:
    """The statistics of a published file; float64, the spatial ones None where it has none.

    Raises ValueError if the file is missing or damaged, or if what it holds are no means and covariances of FID
    Inception features: other keys or shapes, values that are not finite, matrices that are no covariances.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing: download it, or put your own copy there")
    known = _known(path)
    count = known.count if known else 0
    try:
        arrays = np.load(path, allow_pickle=False)
        names = set(arrays.files)
    except (*BROKEN, AttributeError) as error:  # the last for a single array
        raise _damaged(str(path), error) from None
    with arrays:
        if not {"mu", "sigma"} <= names or ("mu_s" in names) != ("sigma_s" in names):
            found = ", ".join(sorted(names)[:5]) or "nothing"
            raise ValueError(f"{path} has {found}, but statistics are mu and sigma: {ADVICE}")
        pooled = _moments(path, arrays, "mu", "sigma", POOLED, count)
        spatial = _moments(path, arrays, "mu_s", "sigma_s", SPATIAL, count) if "mu_s" in names else None
    return ReferenceStatistics(pooled=pooled, spatial=spatial)


def identity(path: Path) -> str:
    """Name and hash of a published file, such as `VIRTUAL_imagenet256_labeled.npz@1f2e3d4c`."""
    return f"{path.name}@{manifest.sha256(path)[:8]}"


def check_evaluator(path: Path, evaluator: str) -> None:
    """Raise ValueError for an evaluator whose features a file's are not: another network or, by its name, resize."""
    known = _known(path)
    allowed = (known.evaluator,) if known else (TENSORFLOW, CLEAN)
    if evaluator not in allowed:
        made = " or ".join(allowed)
        raise ValueError(f"{path.name} was made with {made}, so {evaluator} cannot be compared with it: give another")


def _known(path: Path) -> Known | None:
    return next((known for known in KNOWN if re.fullmatch(known.names, path.stem)), None)


def _moments(path: Path, arrays: np.lib.npyio.NpzFile, mean: str, covariance: str, size: int, count: int) -> Moments:
    found = _array(path, arrays, covariance, (size, size))
    symmetric = (found + found.T) / 2
    eigenvalues = torch.linalg.eigvalsh(symmetric)
    bound = TOLERANCE * eigenvalues[-1]
    if (found - symmetric).abs().max() > bound or eigenvalues[0] < -bound or bound <= 0:
        raise ValueError(
            f"{covariance} in {path} is not a covariance matrix (symmetric, no negative eigenvalue): {ADVICE}"
        )
    return Moments(_array(path, arrays, mean, (size,)), symmetric, count)


def _array(path: Path, arrays: np.lib.npyio.NpzFile, name: str, shape: tuple[int, ...]) -> Tensor:
    if arrays.zip.getinfo(f"{name}.npy").file_size > 8 * prod(shape) + 2**16:
        raise ValueError(f"{name} in {path} is larger than {shape}: {ADVICE}")
    try:
        array = arrays[name]
    except BROKEN as error:
        raise _damaged(f"{name} in {path}", error) from None
    if array.shape != shape or array.dtype.kind != "f":
        raise ValueError(f"{name} in {path} is {array.dtype} {array.shape} instead of floating point {shape}: {ADVICE}")
    tensor = torch.from_numpy(array.astype(np.float64))
    if not tensor.isfinite().all():
        raise ValueError(f"{name} in {path} has values that are not finite: {ADVICE}")
    return tensor


def _damaged(what: str, error: Exception) -> ValueError:
    return ValueError(f"{what} cannot be read ({' '.join(str(error).split())}): {ADVICE}")
