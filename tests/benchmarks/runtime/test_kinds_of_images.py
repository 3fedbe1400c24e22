"""Images of a data set as people have them: converted faithfully, or refused with the file and the reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.datasets import _originals
from benchmarks.datasets._originals import Original
from benchmarks.datasets._pixels import UnsuitedImage, rgb

SIDE = 8
COLOURS = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
GREY = COLOURS[..., 0]
ANY = Original(r".*", ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "MPO"), "bring other files", side=None)


def saved(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(rgb(image, path))


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


PALETTE = Image.fromarray(GREY // 64).convert("P")
PALETTE.putpalette([value for colour in COLOURS[0, :4].tolist() for value in colour])
OPAQUE = np.concatenate([COLOURS, np.full((SIDE, SIDE, 1), 255, np.uint8)], 2)
CONVERTED = {
    "colours": (Image.fromarray(COLOURS), {}, COLOURS),
    "grey": (Image.fromarray(GREY), {}, GREY[..., None].repeat(3, 2)),
    "black and white": (Image.fromarray(GREY > 127), {}, ((GREY > 127) * 255)[..., None].repeat(3, 2)),
    "palette": (PALETTE, {}, COLOURS[0, :4][GREY // 64]),
    "opaque alpha": (Image.fromarray(OPAQUE), {}, COLOURS),
    "grey with opaque alpha": (
        Image.merge("LA", [Image.fromarray(GREY), Image.new("L", (SIDE, SIDE), 255)]),
        {},
        GREY[..., None].repeat(3, 2),
    ),
    "turned by 180 degrees": (Image.fromarray(COLOURS), {"exif": turned(3)}, COLOURS[::-1, ::-1]),
    "turned right": (Image.fromarray(COLOURS), {"exif": turned(6)}, np.rot90(COLOURS, -1)),
    "mirrored": (Image.fromarray(COLOURS), {"exif": turned(2)}, COLOURS[:, ::-1]),
}


@pytest.mark.parametrize(("image", "options", "expected"), CONVERTED.values(), ids=CONVERTED)
def test_kinds_that_8_bits_of_colour_hold_are_converted(image, options, expected, tmp_path):
    assert (read(saved(image, tmp_path / "ein Bild – 模型.png", **options)) == expected).all()


def test_inks_of_a_printer_are_light_times_paper(tmp_path):
    inks = np.concatenate([COLOURS, GREY[..., None].T.reshape(SIDE, SIDE, 1) // 2], 2)
    path = saved(Image.fromarray(inks, "CMYK"), tmp_path / "inks.tiff")
    light = (255 - inks.astype(float)) / 255
    assert np.abs(read(path) - 255 * light[..., :3] * light[..., 3:]).max() <= 1


def test_loaders_that_take_the_colours_that_are_stored_get_them(tmp_path):
    half = np.concatenate([COLOURS, GREY[..., None]], 2)
    for kind in (COLOURS, half):
        path = saved(Image.fromarray(kind), tmp_path / "turned.png", exif=turned(6))
        with Image.open(path) as image:
            assert (np.array(rgb(image, path, as_stored=True)) == COLOURS).all()


def refused(path: Path) -> dict[str, tuple[Path, str]]:
    """A file of each kind that is not read, and why."""
    half = np.concatenate([COLOURS, GREY[..., None]], 2)
    many = [Image.fromarray(COLOURS), Image.fromarray(COLOURS[::-1].copy())]
    wide = np.random.default_rng(1).integers(0, 2**16, (SIDE, SIDE), np.uint16)
    images = {
        "16 bits of grey": (saved(Image.fromarray(wide), path / "a.png"), "more than 8 bits a channel"),
        "32 bits of grey": (saved(Image.fromarray(wide.astype(np.int32)), path / "b.tiff"), "more than 8 bits"),
        "floats": (saved(Image.fromarray(wide.astype(np.float32)), path / "c.tiff"), "more than 8 bits"),
        "transparent": (saved(Image.fromarray(half), path / "d.png"), "transparent in part"),
        "transparent palette": (saved(PALETTE, path / "e.png", transparency=0), "transparent in part"),
        "transparent colour": (
            saved(Image.fromarray(COLOURS), path / "f.png", transparency=tuple(COLOURS[0, 0].tolist())),
            "transparent in part",
        ),
        "animated WebP": (saved(many[0], path / "g.webp", save_all=True, append_images=many[1:]), "is animated, 2"),
        "animated PNG": (saved(many[0], path / "h.png", save_all=True, append_images=many[1:]), "is animated, 2"),
        "animated GIF": (saved(many[0], path / "i.gif", save_all=True, append_images=many[1:]), "is animated, 2"),
        "Lab": (saved(Image.fromarray(COLOURS, "LAB"), path / "j.tiff"), "mode LAB"),
    }
    images["16 bits of colour"] = (wide_colours(path / "k.png"), "more than 8 bits a channel")
    return images


def wide_colours(path: Path) -> Path:
    """A PNG of 16 bits of each colour, which PIL does not write."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in COLOURS.astype(np.uint16) * 257)
    header = struct.pack(">IIBBBBB", SIDE, SIDE, 16, 2, 0, 0, 0)
    png = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + png)
    return path


def test_kinds_that_need_a_choice_are_refused_by_name(tmp_path):
    for kind, (path, reason) in refused(tmp_path).items():
        with pytest.raises(UnsuitedImage, match=f"{path.name} .*{reason}"):
            read(path)
            pytest.fail(f"{kind} was read")


def test_a_data_set_converts_and_refuses_as_its_images_are_read(tmp_path):
    folder = tmp_path / "Bilder 模型"
    folder.mkdir()
    for index, image in enumerate((Image.fromarray(COLOURS), Image.fromarray(GREY))):
        saved(image, folder / f"{index}.png")
    path = saved(Image.fromarray(COLOURS).resize((64, 64)), folder / "2.jpg", quality=95)
    path.write_bytes(path.read_bytes()[:-200])
    saved(Image.fromarray(GREY.astype(np.uint16) * 257), folder / "3.png")
    images = _originals.images(_originals.folder(folder, ANY), ANY, 16, lambda image, side: image)
    assert (images.read(0).permute(1, 2, 0).numpy() == COLOURS).all()
    assert (images.read(1).numpy() == GREY).all()
    with pytest.raises(ValueError, match=r"2\.jpg cannot be read as an image .*truncated"):
        images.read(2)
    with pytest.raises(ValueError, match=r"3\.png has more than 8 bits"):
        images.read(3)


def test_lists_of_images_are_read_whatever_editor_wrote_them(tmp_path):
    for name in ("00001", "00002"):
        saved(Image.fromarray(COLOURS), tmp_path / f"{name}.png")
    (tmp_path / "images.txt").write_bytes(b"\xef\xbb\xbf00002.png\r\n00001\r\n\r\n")
    assert _originals.folder(tmp_path, ANY).names == ["00002.png", "00001.png"]
