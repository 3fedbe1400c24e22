"""What pages show of a cell survives, and damage is one line."""

import numpy as np
import pytest

from benchmarks.runtime import excerpt
from benchmarks.runtime.excerpt import Excerpt
from benchmarks.suite.record import Cell

CELL = Cell("toy", "nearest", "w4a8")
IMAGES = np.arange(2 * 3 * 4 * 4, dtype=np.uint8).reshape(2, 3, 4, 4)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_what_was_written_is_read_and_equal_excerpts_are_equal_files():
    written = Excerpt("ab", IMAGES, {"psnr": np.array([1.5, 2])}, np.array([0.1, 0.2]), np.array([9, 1]))
    excerpt.write(CELL, written)
    first = excerpt.path_of(CELL).read_bytes()
    excerpt.write(CELL, written)
    assert excerpt.path_of(CELL).read_bytes() == first
    found = excerpt.read(CELL)
    assert found.scored == "ab" and list(found.values) == ["psnr"]
    for name in ("images", "temporal_error", "timesteps"):
        assert np.array_equal(getattr(found, name), getattr(written, name))


def test_full_precision_has_no_errors_over_steps():
    excerpt.write(CELL, Excerpt("ab", IMAGES))
    assert excerpt.read(CELL).temporal_error is None


def test_what_is_missing_damaged_or_pickled_is_refused():
    with pytest.raises(ValueError, match=r"w4a8.npz is missing: run `dvc repro`"):
        excerpt.read(CELL)
    excerpt.write(CELL, Excerpt("ab", IMAGES))
    path = excerpt.path_of(CELL)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="is damaged or truncated"):
        excerpt.read(CELL)
    np.savez(path, scored=np.array("ab"), images=np.array([object()], dtype=object))
    with pytest.raises(ValueError, match="is damaged or truncated"):
        excerpt.read(CELL)
