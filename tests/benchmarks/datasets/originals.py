"""A few files of each data set, in its own names, encoding and layout, of random colours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.datasets import cifar10
from benchmarks.small.data import Emoji, write_sheet, write_table

COUNT = 5


def picture(width: int, height: int, seed: int, mode: str = "RGB") -> Image.Image:
    """Smooth colours with some grain, so that filters and crops differ."""
    random = np.random.default_rng(seed)
    channels = {"L": 1, "RGB": 3, "RGBA": 4, "CMYK": 4}[mode]
    coarse = random.integers(0, 256, (max(2, height // 4), max(2, width // 4), channels), dtype=np.uint8)
    planes = [Image.fromarray(coarse[:, :, index]).resize((width, height)) for index in range(channels)]
    return planes[0] if mode == "L" else Image.merge(mode, planes)


def save(image: Image.Image, path: Path, form: str, quality: int = 90) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, form, quality=quality)
    return path


def emoji(folder: Path) -> int:
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    write_sheet(
        torch.randint(0, 256, (COUNT, 3, 64, 64), dtype=torch.uint8, generator=generator), folder / "sheet.webp"
    )
    write_table([Emoji(i, f"emoji {i}", "Objects", "google", "train") for i in range(COUNT)], folder / "emoji.csv")
    return 32


def lsun(folder: Path) -> int:
    for index in range(COUNT):
        save(picture(256 + 40 * index, 256, index), folder / f"{index:040x}.webp", "WEBP")
    return 64


def imagenet(folder: Path) -> int:
    for index in range(COUNT):
        label = f"n{index % 2:08d}"
        save(picture(90, 70 + index, index), folder / label / f"{label}_{index}.JPEG", "JPEG")
    return 32


def coco(folder: Path) -> int:
    names = [f"COCO_val2014_{index:012d}.jpg" for index in range(COUNT)]
    for index, name in enumerate(names):
        save(picture(64, 48, index), folder / "val2014" / name, "JPEG")
    (folder / "images.txt").write_text("\n".join(names))
    return 32


def celebahq(folder: Path) -> int:
    return _faces(folder, "imgHQ{:05d}.png")


def ffhq(folder: Path) -> int:
    return _faces(folder, "00000/{:05d}.png")


def _faces(folder: Path, name: str) -> int:
    for index in range(COUNT):
        path = folder / name.format(index)
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = np.random.default_rng(index).integers(0, 256, (128, 128, 3), dtype=np.uint8)
        Image.fromarray(coarse.repeat(8, 0).repeat(8, 1)).save(path, compress_level=1)
    return 64


def cifar(folder: Path) -> int:
    """Needs `cifar10.RECORDS` to be 1."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for label, name in enumerate(cifar10.FILES):
        (folder / name).write_bytes(bytes([label]) + random.integers(0, 256, 3072, dtype=np.uint8).tobytes())
    return 32


WRITERS = {
    "celebahq": celebahq,
    "cifar10": cifar,
    "coco": coco,
    "emoji": emoji,
    "ffhq": ffhq,
    "imagenet": imagenet,
    "lsun": lsun,
}
