"""The files of a data set as its makers published them: listed, told from copies, and decoded one at a time.

A lossy or resized copy moves a distance by more than most methods do: 2.5 against 5.8 for PNG and JPEG samples of one
model (a report in the repository forever208/DDPM-IP), 4 against 14 for LSUN images that missed their own loader (one in
CompVis/latent-diffusion). So files must have the names and the encoding of the original, which may itself be lossy.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.datasets import Images
from benchmarks.datasets._pixels import UnsuitedImage, rgb
from benchmarks.runtime.text import read_lines

# A text file in a data set's folder that lists the images to use, a name a line, instead of all in the order of names.
LIST = "images.txt"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".npy", ".npz")
# Files, evenly spread, that are looked at before the first image is used.
PROBES = 64
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)

Resize = Callable[[Image.Image, int], Image.Image]


@dataclass(frozen=True)
class Original:
    """What tells the files of a data set from copies.

    ``names`` matches the name of a file, ``formats`` are the encodings that PIL may find in it, whatever its name.
    ``side`` is both sides of every image in pixels, or None where sizes differ; ``shorter`` the shorter side that
    images have as a rule, or None. ``as_stored`` as in `rgb`. ``advice`` ends the messages: where the originals come
    from.
    """

    names: str
    formats: tuple[str, ...]
    advice: str
    side: int | None = None
    shorter: int | None = None
    as_stored: bool = False


@dataclass(frozen=True)
class Files:
    """Images at ``path`` in their order: ``open(name)`` gives what PIL reads one from. ``stamp`` as in `Images`."""

    path: Path
    names: list[str]
    open: Callable[[str], Path | BinaryIO]
    stamp: str


def folder(
    path: Path,
    original: Original,
    order: Callable[[Iterable[str]], list[str]] = sorted,
    wanted: list[str] | None = None,
) -> Files:
    """The images of a folder and of those in it: those that its `LIST` names, else ``wanted``, else all in ``order``.

    Raises ValueError if there are none, or for a file that is missing or has another name than originals have.
    """
    if not path.is_dir():
        raise ValueError(f"there is no folder {path}: {original.advice}")
    found = _walk(path)
    if (path / LIST).is_file():
        wanted = listed(path / LIST)
    names = order(found) if wanted is None else _chosen(path, found, wanted, original)
    if not names:
        raise ValueError(f"{path} has no images: {original.advice}")
    wrong = [name for name in names if not _named_as(original, name)]
    if wrong:
        raise ValueError(f"{path / wrong[0]} is not named as the original's images are: {original.advice}")
    digest = hashlib.sha256()
    for name in names:
        status = (path / name).stat()
        digest.update(f"{name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return Files(path, names, lambda name: path / name, digest.hexdigest())


def listed(listing: Path) -> list[str]:
    """The names of images that a file lists, a line each, without folders and suffixes, in which lists differ.

    Raises ValueError for one that is given twice.
    """
    names: dict[str, None] = {}
    for line in filter(None, map(str.strip, read_lines(listing))):
        name = PurePosixPath(line).stem
        if name in names:
            raise ValueError(f"{listing} lists {name} twice: remove one of them")
        names[name] = None
    return list(names)


def images(files: Files, original: Original, resolution: int, resize: Resize) -> Images:
    """The images of ``files``, resized when they are read.

    Raises ValueError for copies: files of another format or size, or a folder in which all images have the resolution
    already. Some files are looked at here, every one when it is read.
    """
    step = max(1, len(files.names) // PROBES)
    sizes = []
    for name in files.names[::step]:
        with _opened(files, name, original) as image:
            sizes.append(image.size)
    if original.side is None and set(sizes) == {(resolution, resolution)}:
        raise ValueError(
            f"all images of {files.path} are {resolution} x {resolution} pixels: these are resized copies, and another"
            f" crop or filter than the original's loader moves a distance; {original.advice}"
        )
    if original.shorter is not None and all(min(size) != original.shorter for size in sizes):
        raise ValueError(
            f"{files.path} holds copies of another size: the original's images have a shorter side of"
            f" {original.shorter} pixels; {original.advice}"
        )

    def read(index: int) -> Tensor:
        name = files.names[index]
        with _opened(files, name, original) as image:
            try:
                pixels = rgb(image, files.path / name, original.as_stored)
            except UnsuitedImage:
                raise
            except UNREADABLE as error:
                raise _unreadable(files, name, error, original) from None
        return torch.from_numpy(np.array(resize(pixels, resolution))).permute(2, 0, 1)

    return Images(len(files.names), read, files.stamp)


def _named_as(original: Original, name: str) -> bool:
    return re.fullmatch(original.names, PurePosixPath(name).name) is not None


def _chosen(path: Path, found: list[str], wanted: list[str], original: Original) -> list[str]:
    """The files among ``found`` that are ``wanted``, in that order; other files do not matter."""
    files: dict[str, str] = {}
    for name in filter(partial(_named_as, original), found):
        stem = PurePosixPath(name).stem
        if stem in files:
            raise ValueError(f"{path} has both {files[stem]} and {name}: remove the copy")
        files[stem] = name
    missing = [name for name in wanted if name not in files]
    if missing:
        some = f"{len(missing)} of {len(wanted)} images are missing in {path}, the first is {missing[0]}"
        raise ValueError(f"{some}: {original.advice}")
    return [files[name] for name in wanted]


def _walk(path: Path) -> list[str]:
    found = []
    for folder_name, _, names in os.walk(path):
        inside = Path(folder_name).relative_to(path)
        found += [
            (inside / name).as_posix() for name in names if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        ]
    return found


def _opened(files: Files, name: str, original: Original) -> Image.Image:
    """An image of which the header is read; the rest is when pixels are asked for."""
    try:
        image = Image.open(files.open(name))
    except UNREADABLE as error:
        raise _unreadable(files, name, error, original) from None
    if image.format not in original.formats:
        image.close()
        raise ValueError(
            f"{files.path / name} is {image.format}, but the original's encoding is {' or '.join(original.formats)}:"
            f" re-encoded copies move a distance; {original.advice}"
        )
    if original.side is not None and image.size != (original.side, original.side):
        image.close()
        raise ValueError(
            f"{files.path / name} has {image.width} x {image.height} pixels instead of {original.side} x"
            f" {original.side}: {original.advice}"
        )
    return image


def _unreadable(files: Files, name: str, error: Exception, original: Original) -> ValueError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return ValueError(f"{files.path / name} cannot be read as an image ({reason}): {original.advice}")
