import base64
import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.small import data, download


def png(color: tuple[int, int, int, int], size: int = 64) -> bytes:
    file = io.BytesIO()
    Image.new("RGBA", (size, size), color).save(file, "PNG")
    return file.getvalue()


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def archives(tmp_path: Path) -> dict[str, Path]:
    """Two packages with 40 emoji, the first of which has a skin variation that only the first vendor drew."""
    paths = {}
    for number, vendor in enumerate(data.VENDORS):
        entries = [
            {"name": f"EMOJI {i}", "category": "Objects", "image": f"{i}.png", f"has_img_{vendor}": True}
            for i in range(40)
        ]
        entries[0]["skin_variations"] = {"1F3FB": {"image": "0-1f3fb.png", f"has_img_{vendor}": vendor == "google"}}
        paths[vendor] = tmp_path / f"{vendor}.tgz"
        with tarfile.open(paths[vendor], "w:gz") as archive:
            add(archive, "../outside.txt", b"never written")
            add(archive, "package/emoji.json", json.dumps(entries).encode())
            add(archive, f"package/img/{vendor}/64/0-1f3fb.png", png((1, 2, 3, 255)))
            for i in range(40):
                add(archive, f"package/img/{vendor}/64/{i}.png", png((i, 100 * number, 0, 255)))
    return paths


def test_prepare_writes_every_image_in_the_order_of_vendor_and_file(archives, tmp_path):
    rows = data.prepare(archives, tmp_path / "emoji", seed=0)
    assert rows == data.load_table(tmp_path / "emoji")
    assert [row.index for row in rows] == list(range(81))
    assert [rows[i].name for i in (0, 1, 2, 41)] == ["EMOJI 0", "EMOJI 0", "EMOJI 1", "EMOJI 0"]
    images = data.load_images(tmp_path / "emoji", 64)
    assert images.shape == (81, 3, 64, 64)
    assert images[:, :, 5, 7][[0, 1, 2, 41, 80]].tolist() == [
        [0, 0, 0],
        [1, 2, 3],
        [1, 0, 0],
        [0, 100, 0],
        [39, 100, 0],
    ]
    assert not (tmp_path / "outside.txt").exists()
    assert not (tmp_path / "emoji" / "sheet.tmp").exists()


def test_prepare_gives_the_same_bytes_again(archives, tmp_path):
    for folder in ("first", "second"):
        data.prepare(archives, tmp_path / folder, seed=0)
    for name in ("sheet.webp", "emoji.csv"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_held_out_names_are_held_out_for_both_vendors(archives, tmp_path):
    rows = data.prepare(archives, tmp_path, seed=0)
    held_out = {row.name for row in rows if row.split == "held-out"}
    assert len(held_out) == 2
    assert all((row.name in held_out) == (row.split == "held-out") for row in rows)
    assert len(data.load_split(tmp_path, 32, "held-out")) == sum(row.name in held_out for row in rows)


def test_the_split_depends_on_the_seed():
    names = {f"EMOJI {i}" for i in range(200)}
    assert len(data.hold_out(names, 0)) == 10
    assert data.hold_out(names, 0) != data.hold_out(names, 1)


def test_transparent_pixels_become_white():
    assert data.on_white(png((10, 20, 30, 0)))[:, 0, 0].tolist() == [255, 255, 255]
    assert data.on_white(png((0, 0, 0, 51)))[:, 0, 0].tolist() == [204, 204, 204]


def test_an_image_of_another_size_is_refused():
    with pytest.raises(ValueError, match="32x32"):
        data.on_white(png((0, 0, 0, 255), size=32))


def test_the_sheet_keeps_every_pixel_over_several_rows(tmp_path):
    count = data.COLUMNS + 3
    tiles = torch.randint(0, 256, (count, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data.write_sheet(tiles, tmp_path / "sheet.webp")
    data.write_table([data.Emoji(i, "A", "Objects", "google", "train") for i in range(count)], tmp_path / "emoji.csv")
    assert torch.equal(data.load_images(tmp_path, 64), tiles)
    means = tiles.numpy().astype(np.float64).reshape(count, 3, 32, 2, 32, 2).mean(axis=(3, 5))
    assert np.array_equal(data.load_images(tmp_path, 32).numpy(), np.floor(means + 0.5))
    with pytest.raises(ValueError, match="resolution is 16"):
        data.load_images(tmp_path, 16)


def test_a_changed_archive_is_refused(tmp_path):
    path = tmp_path / "a.tgz"
    path.write_bytes(b"content")
    download.check(path, "sha512-" + base64.b64encode(hashlib.sha512(b"content").digest()).decode())
    with pytest.raises(ValueError, match="fetch it again"):
        download.check(path, "sha512-AAAA")
