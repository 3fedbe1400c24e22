"""The emoji of the small suite: 64 x 64 pixels on white, at 32 the means of 2 x 2 pixels.

`data.dvc` brings them (`dvc pull data.dvc`): a folder with `sheet.webp`, a lossless atlas, and `emoji.csv`, a line an
image. They are Noto Emoji (Google, Apache-2.0) and Twemoji (Twitter, CC BY 4.0): see `benchmarks/small/README.md`.
"""

from pathlib import Path

from torch import Tensor

from benchmarks.datasets import Dataset, Images
from benchmarks.small.data import load_images, load_split, load_table


def images(path: Path, resolution: int) -> Images:
    """All emoji, in the order of the table. They are few, and stay in memory."""
    tensor = load_images(path, resolution)
    files = [(path / name).stat() for name in ("sheet.webp", "emoji.csv")]
    return Images(len(tensor), tensor.__getitem__, " ".join(f"{found.st_size} {found.st_mtime_ns}" for found in files))


def held_out(path: Path, resolution: int) -> tuple[Tensor, list[str]]:
    """The emoji whose names were held out from all training, with these names."""
    names = [row.name for row in load_table(path) if row.split == "held-out"]
    return load_split(path, resolution, "held-out"), names


DATASET = Dataset("emoji@1 (on white, means of 2 x 2 pixels below 64)", images, held_out)
