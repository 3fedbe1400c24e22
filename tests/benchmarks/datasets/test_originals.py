"""Originals are read with the colours that PIL gives them; copies and damaged files are refused in one line."""

from __future__ import annotations

import io
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.datasets import cifar10, coco, dataset, imagenet
from benchmarks.datasets._originals import listed
from tests.benchmarks.datasets.originals import COUNT, WRITERS, picture, save


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_lsun_converts_colours_then_crops_then_resizes(mode, tmp_path):
    path = save(picture(256, 300, 0, mode), tmp_path / "lsun" / f"{'a' * 40}.jpg", "JPEG")
    (image,) = dataset("lsun").images(tmp_path / "lsun", 64).batches(4)
    with Image.open(path) as opened:
        assert opened.mode == mode
        square = np.array(opened.convert("RGB"))[22:278]
    expected = np.array(Image.fromarray(square).resize((64, 64), Image.BICUBIC))
    assert np.array_equal(image[0].permute(1, 2, 0).numpy(), expected)


def test_transparency_is_dropped_as_pil_does(tmp_path):
    image = picture(300, 256, 1, "RGBA")
    path = tmp_path / "lsun" / f"{'b' * 40}.webp"
    path.parent.mkdir()
    image.save(path, "WEBP", lossless=True, exact=True)
    (found,) = dataset("lsun").images(path.parent, 256).batches(1)
    assert np.array_equal(found[0].permute(1, 2, 0).numpy(), np.array(image)[:, 22:278, :3])


def test_training_images_of_imagenet_come_in_rounds_of_the_classes():
    paths = [f"n{label:08d}/n{label:08d}_{number}.JPEG" for label in (2, 1, 3) for number in (7, 30, 12)]
    paths.append("n00000002_99.JPEG")
    names = [path.split("/")[-1].removesuffix(".JPEG") for path in imagenet.by_turns(paths)]
    assert [name.split("_")[0][-1] for name in names] == list("1231231232")
    assert len(set(names)) == 10
    flat = [path.split("/")[-1] for path in paths]
    assert imagenet.by_turns(flat) == [path.split("/")[-1] for path in imagenet.by_turns(paths)]


def test_validation_images_of_imagenet_come_in_the_order_of_their_numbers_wherever_they_lie():
    paths = [f"n0000000{number % 3}/ILSVRC2012_val_{number:08d}.JPEG" for number in (5, 3, 1, 4, 2)]
    assert [path[-6] for path in imagenet.by_turns(paths)] == list("12345")
    with pytest.raises(ValueError, match="training and validation images of ImageNet lie in one folder"):
        imagenet.by_turns([*paths, "n00000001_1.JPEG"])


def test_cifar_is_read_in_the_order_of_its_files(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "RECORDS", 2)
    random = np.random.default_rng(0)
    records = random.integers(0, 256, (10, 3073), dtype=np.uint8)
    records[:, 0] = np.arange(10)
    for index, name in enumerate(cifar10.FILES):
        (tmp_path / name).write_bytes(records[2 * index : 2 * index + 2].tobytes())
    images = torch.cat(list(dataset("cifar10").images(tmp_path, 32).batches(3)))
    # A record is its label, then all red values row by row, then green, then blue.
    assert images.shape == (10, 3, 32, 32)
    assert images[7, 1, 2, 3] == records[7, 1 + 1024 + 2 * 32 + 3]
    assert np.array_equal(images.flatten(1).numpy(), records[:, 1:])


def test_the_images_of_coco_are_5000_different_ones():
    ids = listed(coco.IDS)
    assert len(ids) == 5000 and all(name.isdigit() and int(name) < 10**6 for name in ids)


def test_coco_takes_the_images_of_the_captions(tmp_path):
    first, second = listed(coco.IDS)[:2]
    for index, number in enumerate((first, second, "7")):
        save(picture(64, 48, index), tmp_path / f"COCO_val2014_{int(number):012d}.jpg", "JPEG")
    message = rf"4998 of 5000 images are missing in {tmp_path}, the first is COCO_val2014_\d{{12}}: unpack val2014.zip"
    with pytest.raises(ValueError, match=message):
        dataset("coco").images(tmp_path, 32)


def test_a_list_in_the_folder_chooses_and_orders_whatever_folders_and_suffixes_it_has(tmp_path):
    WRITERS["ffhq"](tmp_path / "ffhq")
    everything = torch.cat(list(dataset("ffhq").images(tmp_path / "ffhq", 64).batches(8)))
    (tmp_path / "ffhq" / "images.txt").write_text("00003.png\n\nelsewhere/00001.npy\n")
    chosen = torch.cat(list(dataset("ffhq").images(tmp_path / "ffhq", 64).batches(8)))
    assert torch.equal(chosen, everything[[3, 1]])


def copy_as(form: str, suffix: str):
    """Encode the first image again in place of the original."""

    def change(folder):
        path = sorted(path for path in folder.rglob("*.*") if path.suffix != ".txt")[0]
        with Image.open(path) as image:
            image.load()
        path.unlink()
        save(image.convert("RGB"), path.with_suffix(suffix), form)

    return change


def resize_all(folder):
    for path in folder.rglob("*.*"):
        if path.suffix == ".txt":
            continue
        with Image.open(path) as image:
            form, small = image.format, image.resize((32, 32))
        save(small, path, form)


def cut(folder):
    for path in folder.rglob("*.*"):
        if path.suffix != ".txt":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def list_another(folder):
    (folder / "images.txt").write_text("nothing.jpg\n")


def list_twice(folder):
    (folder / "images.txt").write_text("a.png\nb/a.png\n")


def list_a_copied_one(folder):
    shutil.copytree(folder / "00000", folder / "copy")
    (folder / "images.txt").write_text("00001.png\n")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("lsun", copy_as("PNG", ".png"), r"0.png is not named as the original's images are: use LSUN's own"),
        ("lsun", copy_as("PNG", ".webp"), r"is PNG, but the original's encoding is WEBP or JPEG: re-encoded copies"),
        ("lsun", resize_all, r"all images of .* are 32 x 32 pixels: these are resized copies"),
        ("lsun", empty, "has no images: use LSUN's own database"),
        ("ffhq", copy_as("JPEG", ".jpg"), "0.jpg is not named as the original's images are: use images1024x1024"),
        ("ffhq", copy_as("JPEG", ".png"), "is JPEG, but the original's encoding is PNG"),
        ("ffhq", resize_all, "has 32 x 32 pixels instead of 1024 x 1024: use images1024x1024 of FFHQ"),
        ("celebahq", copy_as("JPEG", ".jpg"), "is not named as the original's images are: make the PNG images"),
        ("celebahq", resize_all, "has 32 x 32 pixels instead of 1024 x 1024"),
        ("imagenet", resize_all, "are 32 x 32 pixels: these are resized copies"),
        ("imagenet", copy_as("WEBP", ".JPEG"), "is WEBP, but the original's encoding is JPEG or MPO or PNG"),
        ("coco", resize_all, "are 32 x 32 pixels: these are resized copies"),
        ("coco", list_another, "1 of 1 images are missing in .*data, the first is nothing: unpack val2014.zip"),
        ("ffhq", list_twice, "images.txt lists a twice"),
        ("ffhq", list_a_copied_one, r"has both \w+/(\d+).png and \w+/\1.png: remove the copy"),
    ],
)
def test_copies_are_refused(name, change, message, tmp_path):
    WRITERS[name](tmp_path / "data")
    change(tmp_path / "data")
    with pytest.raises(ValueError, match=message) as raised:
        dataset(name).images(tmp_path / "data", 32)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["lsun", "imagenet", "ffhq", "coco"])
def test_a_truncated_file_is_named(name, tmp_path):
    resolution = WRITERS[name](tmp_path / "data")
    cut(tmp_path / "data")
    with pytest.raises(ValueError, match="cannot be read as an image") as raised:
        list(dataset(name).images(tmp_path / "data", resolution).batches(2))
    assert str(tmp_path) in str(raised.value) and "\n" not in str(raised.value)


def test_a_file_that_is_no_image_is_named(tmp_path):
    WRITERS["lsun"](tmp_path / "data")
    path = tmp_path / "data" / f"{'0' * 40}.webp"
    path.write_text("<html>Not found</html>")
    with pytest.raises(ValueError, match=re.escape(f"{path} cannot be read as an image (cannot identify image file")):
        dataset("lsun").images(tmp_path / "data", 64)


def test_files_that_change_change_the_stamp(tmp_path):
    resolution = WRITERS["lsun"](tmp_path / "data")
    before = dataset("lsun").images(tmp_path / "data", resolution).stamp
    save(picture(256, 256, 9), tmp_path / "data" / f"{0:040x}.webp", "WEBP")
    assert dataset("lsun").images(tmp_path / "data", resolution).stamp != before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "data_batch_3.bin").unlink(), "data_batch_3.bin is missing: unpack cifar-10-binary"),
        (lambda folder: (folder / "data_batch_3.bin").write_bytes(b"x" * 9), "has 9 bytes instead of 3073"),
        (lambda folder: (folder / "data_batch_3.bin").write_bytes(b"\xff" * 3073), "has a label above 9"),
    ],
)
def test_other_files_than_those_of_cifar_are_refused(change, message, tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "RECORDS", 1)
    WRITERS["cifar10"](tmp_path / "data")
    change(tmp_path / "data")
    with pytest.raises(ValueError, match=message):
        dataset("cifar10").images(tmp_path / "data", 32)


def test_cifar_has_one_resolution(tmp_path):
    with pytest.raises(ValueError, match="resolution is 64, but the images of CIFAR-10 have 32"):
        dataset("cifar10").images(tmp_path, 64)


def write_database(folder, images):
    lmdb = pytest.importorskip("lmdb", reason="the package lmdb is not installed")
    folder.mkdir()
    with lmdb.open(str(folder), map_size=2**24) as store, store.begin(write=True) as transaction:
        for key, image in images.items():
            file = io.BytesIO()
            image.save(file, "WEBP", quality=90)
            transaction.put(key.encode(), file.getvalue())


def test_a_database_gives_what_its_export_gives(tmp_path):
    images = {f"{index:040x}": picture(300 - index, 256, index) for index in range(COUNT)}
    write_database(tmp_path / "lmdb", dict(reversed(images.items())))
    for key, image in images.items():
        save(image, tmp_path / "folder" / key[-1] / f"{key}.webp", "WEBP")
    found = [dataset("lsun").images(tmp_path / where, 64) for where in ("lmdb", "folder")]
    assert torch.equal(*(torch.cat(list(each.batches(2))) for each in found))
    (tmp_path / "lmdb" / "images.txt").write_text(f"{3:040x}.webp\n{1:040x}.webp\n")
    chosen = dataset("lsun").images(tmp_path / "lmdb", 64)
    assert torch.equal(next(chosen.batches(2)), torch.cat(list(found[1].batches(9)))[[3, 1]])
    (tmp_path / "lmdb" / "images.txt").write_text(f"{9:040x}.webp\n")
    with pytest.raises(ValueError, match="1 of 1 images are missing in .*lmdb, the first is 0+9: use LSUN's own"):
        dataset("lsun").images(tmp_path / "lmdb", 64)


def test_a_database_of_something_else_is_refused(tmp_path):
    write_database(tmp_path / "lmdb", {"image-1": picture(300, 256, 0)})
    with pytest.raises(ValueError, match="has the key image-1, so it is none of the original's databases"):
        dataset("lsun").images(tmp_path / "lmdb", 64)
    (tmp_path / "lmdb" / "data.mdb").write_bytes(b"x" * 5000)
    with pytest.raises(ValueError, match="data.mdb cannot be read"):
        dataset("lsun").images(tmp_path / "lmdb", 64)


def test_a_database_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmdb", None)
    (tmp_path / "data.mdb").write_bytes(b"")
    with pytest.raises(ValueError, match="is an LMDB database: run `pip install lmdb`, or export it"):
        dataset("lsun").images(tmp_path, 64)
