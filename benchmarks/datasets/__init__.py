"""One file a data set: its images as the papers' own loaders prepare them, in a fixed order.

Each module here that does not start with `_` holds `DATASET`, and is found by its file name. Its text says where the
files come from, under which terms, and how the folder must look. A distance to a data set changes more with the crop,
the filter and the codec than with most methods, so all of these are in a data set's `identity`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.suite import discover

__all__ = ["Dataset", "Images", "dataset"]

# Threads that decode and resize, both of which release Python's lock.
READERS = 4


@dataclass(frozen=True)
class Images:
    """Images of one size in a fixed order, of which no more are in memory than are asked for.

    ``read(index)`` gives one as uint8 [3, R, R] and may be called from several threads. ``stamp`` changes with the
    files (names, sizes, times of change): unfinished work on other files is never continued.
    """

    count: int
    read: Callable[[int], Tensor]
    stamp: str

    def __len__(self) -> int:
        return self.count

    def first(self, count: int) -> Images:
        """The first ``count`` of them, or all where there are no more."""
        return replace(self, count=min(count, self.count))

    def batches(self, size: int, rows: range | None = None) -> Iterator[Tensor]:
        """Batches uint8 [size, 3, R, R] of all images or of ``rows``, the last one as small as it comes.

        The next batch is read while one is used. Raises ValueError for a file that is not an image of the data set.
        """
        rows = range(self.count) if rows is None else rows
        with ThreadPoolExecutor(READERS) as readers:
            ahead: list[Future[Tensor]] = []
            for start in range(0, len(rows), size):
                asked = [readers.submit(self.read, index) for index in rows[start : start + size]]
                if ahead:
                    yield torch.stack([image.result() for image in ahead])
                ahead = asked
            if ahead:
                yield torch.stack([image.result() for image in ahead])


@dataclass(frozen=True)
class Dataset:
    """How a data set is read.

    ``identity`` names the preprocessing, with a version that rises when anything changes that moves a number: crop,
    filter, colours, order. ``images(path, resolution)`` opens the files at ``path``. Any beginning of the images is a
    fair sample of them, so that a task may take the first `data_images`. It raises ValueError, in one line that says
    what to do, where files are missing, or are resized or re-encoded copies, or the data set has no such resolution.
    ``held_out(path, resolution)``, where a data set has it, gives the images (N, 3, R, R) in uint8 that no model of the
    suite was trained on, and their N captions: what a CLIP says of them tells what its score of samples means.
    """

    identity: str
    images: Callable[[Path, int], Images]
    held_out: Callable[[Path, int], tuple[Tensor, list[str]]] | None = None


def dataset(name: str) -> Dataset:
    """The data set of the file of that name; a ValueError names the nearest if there is none."""
    return discover.find(discover.DATASETS, "dataset", name)
