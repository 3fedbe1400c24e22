"""The emoji images: read from two npm packages, written as one atlas and one table, read back as tensors."""

import csv
import hashlib
import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

VENDORS = ("google", "twitter")
TILE = 64
COLUMNS = 88
HELD_OUT_FRACTION = 0.05
FIELDS = ("index", "name", "category", "vendor", "split")


@dataclass(frozen=True)
class Emoji:
    """One image of the data: the emoji's Unicode name and category, who drew it, and `train` or `held-out`."""

    index: int
    name: str
    category: str
    vendor: str
    split: str


def prepare(archives: dict[str, Path], folder: Path, seed: int) -> list[Emoji]:
    """Write `sheet.webp` and `emoji.csv` to `folder`, from one npm archive for each vendor.

    Members are read in place and nothing is unpacked, so that a path in an archive never reaches the file system.
    Images are in the order of the vendors, then of the archive's emoji.json, each emoji before its skin variations.
    """
    tiles, rows = [], []
    held_out: set[str] = set()
    for vendor, archive in archives.items():
        with tarfile.open(archive) as members:
            entries = json.loads(_member(members, "package/emoji.json"))
            held_out |= hold_out({entry["name"] for entry in entries}, seed)
            for entry in entries:
                for image in (entry, *entry.get("skin_variations", {}).values()):
                    if not image[f"has_img_{vendor}"]:
                        continue
                    tiles.append(on_white(_member(members, f"package/img/{vendor}/{TILE}/{image['image']}")))
                    split = "held-out" if entry["name"] in held_out else "train"
                    rows.append(Emoji(len(rows), entry["name"], entry["category"], vendor, split))
    folder.mkdir(parents=True, exist_ok=True)
    write_sheet(torch.stack(tiles), folder / "sheet.webp")
    write_table(rows, folder / "emoji.csv")
    return rows


def hold_out(names: set[str], seed: int) -> set[str]:
    """The twentieth of the names whose hash, salted with the seed, is smallest: any language finds the same ones."""
    ordered = sorted(names, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    return set(ordered[: round(HELD_OUT_FRACTION * len(ordered))])


def on_white(png: bytes) -> Tensor:
    """A PNG composited on white, as uint8 [3, 64, 64]."""
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    if image.size != (TILE, TILE):
        raise ValueError(f"An image is {image.size[0]}x{image.size[1]} pixels; expected {TILE}x{TILE}.")
    white = Image.new("RGBA", image.size, "white")
    return torch.from_numpy(np.array(Image.alpha_composite(white, image).convert("RGB"))).permute(2, 0, 1)


def write_sheet(tiles: Tensor, path: Path) -> None:
    """Write uint8 tiles [N, 3, 64, 64] row by row into one lossless image; the rest of its last row is white."""
    rows = -(-len(tiles) // COLUMNS)
    sheet = torch.full((rows * COLUMNS, 3, TILE, TILE), 255, dtype=torch.uint8)
    sheet[: len(tiles)] = tiles
    sheet = sheet.reshape(rows, COLUMNS, 3, TILE, TILE).permute(0, 3, 1, 4, 2).reshape(rows * TILE, COLUMNS * TILE, 3)
    unfinished = path.with_suffix(".tmp")
    Image.fromarray(sheet.numpy()).save(unfinished, format="WEBP", lossless=True, method=4, quality=100)
    unfinished.replace(path)


def write_table(rows: list[Emoji], path: Path) -> None:
    """Write one line for each image, in the atlas's order."""
    unfinished = path.with_suffix(".tmp")
    with unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(FIELDS)
        writer.writerows([row.index, row.name, row.category, row.vendor, row.split] for row in rows)
    unfinished.replace(path)


def load_table(folder: Path) -> list[Emoji]:
    """The rows of `emoji.csv`, in the atlas's order."""
    with (folder / "emoji.csv").open(newline="", encoding="utf-8") as file:
        return [
            Emoji(int(row["index"]), row["name"], row["category"], row["vendor"], row["split"])
            for row in csv.DictReader(file)
        ]


def load_images(folder: Path, resolution: int) -> Tensor:
    """All images as uint8 [N, 3, resolution, resolution]; 32 is the mean of 2x2 pixels of the tiles, rounded."""
    if resolution not in (TILE, TILE // 2):
        raise ValueError(
            f"resolution is {resolution}; the emoji are stored at {TILE} and read at {TILE // 2} or {TILE}."
        )
    count = len(load_table(folder))
    with Image.open(folder / "sheet.webp") as image:
        sheet = torch.from_numpy(np.array(image.convert("RGB")))
    rows, columns = sheet.shape[0] // TILE, sheet.shape[1] // TILE
    tiles = sheet.reshape(rows, TILE, columns, TILE, 3).permute(0, 2, 4, 1, 3).reshape(-1, 3, TILE, TILE)[:count]
    if resolution == TILE:
        return tiles.contiguous()
    sums = tiles.reshape(count, 3, resolution, 2, resolution, 2).sum(dim=(3, 5), dtype=torch.int16)
    return ((sums + 2) // 4).to(torch.uint8)


def load_split(folder: Path, resolution: int, split: str) -> Tensor:
    """The images of one split, `train` or `held-out`, as uint8 [N, 3, resolution, resolution]."""
    chosen = torch.tensor([row.split == split for row in load_table(folder)])
    return load_images(folder, resolution)[chosen]


def _member(members: tarfile.TarFile, name: str) -> bytes:
    file = members.extractfile(name)
    if file is None:
        raise ValueError(f"{name} is not a regular file in {members.name}.")
    return file.read()
