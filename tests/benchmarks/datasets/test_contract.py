"""What every data set keeps to, whichever it is."""

from __future__ import annotations

import re

import pytest
import torch

from benchmarks.datasets import Dataset, Images, cifar10, dataset
from benchmarks.suite import discover
from tests.benchmarks.datasets.originals import COUNT, WRITERS

NAMES = discover.names(discover.DATASETS)


@pytest.fixture(autouse=True)
def one_record_a_file(monkeypatch):
    monkeypatch.setattr(cifar10, "RECORDS", 1)


def test_every_data_set_has_files_to_be_tested_with():
    assert set(NAMES) == set(WRITERS)
    assert len({dataset(name).identity for name in NAMES}) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_images_come_in_batches_in_a_fixed_order(name, tmp_path):
    found = dataset(name)
    assert isinstance(found, Dataset) and re.fullmatch(r"[\w-]+@\d+ \(.+\)", found.identity)
    resolution = WRITERS[name](tmp_path / "data")
    images = found.images(tmp_path / "data", resolution)
    assert len(images) == COUNT
    batches = list(images.batches(2))
    assert [tuple(batch.shape) for batch in batches] == [(n, 3, resolution, resolution) for n in (2, 2, 1)]
    assert {batch.dtype for batch in batches} == {torch.uint8}
    together = torch.cat(batches)
    again = dataset(name).images(tmp_path / "data", resolution)
    assert torch.equal(torch.cat(list(again.batches(COUNT))), together) and again.stamp == images.stamp
    assert torch.equal(torch.cat(list(images.batches(2, range(1, 4)))), together[1:4])
    assert len(images.first(3)) == 3 and len(images.first(99)) == COUNT
    assert torch.equal(torch.cat(list(images.first(3).batches(4))), together[:3])
    assert len({image.numpy().tobytes() for image in together}) == COUNT


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_folder_is_one_clear_line(name, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        dataset(name).images(tmp_path / "nowhere", 32)
    assert "nowhere" in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("name", NAMES)
def test_the_text_says_where_files_come_from_and_how_they_must_lie(name):
    text = discover.text(discover.DATASETS, name)
    assert "folder" in text and re.search("Where:|data.dvc", text)


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(ValueError, match="unknown dataset 'lsum': did you mean 'lsun'"):
        dataset("lsum")


def test_what_goes_wrong_while_reading_ahead_is_raised():
    def read(index):
        if index == 3:
            raise ValueError("image 3 is damaged")
        return torch.full((3, 2, 2), index, dtype=torch.uint8)

    batches = Images(6, read, "").batches(2)
    assert next(batches)[1, 0, 0, 0] == 1
    with pytest.raises(ValueError, match="image 3 is damaged"):
        next(batches)
