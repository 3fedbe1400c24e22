"""CIFAR-10 (Krizhevsky, 2009): the 50,000 training images, which are 32 x 32 pixels and stay as they are.

Where: `cifar-10-binary.tar.gz` ("binary version") of the author's page at the University of Toronto; no licence is
stated, the page asks to cite the report. Layout: a folder with `data_batch_1.bin` to `data_batch_5.bin`, or with the
archive's folder `cifar-10-batches-bin`. A file is 10,000 records of a label and 3 x 32 x 32 bytes. The python version
holds the same images as pickles, which can run code when they are read, so it is not.

In the order of the files, which is random in the classes and that of all other readers.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.datasets import Dataset, Images

FILES = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
UNPACKED = "cifar-10-batches-bin"
RECORDS = 10_000
SIDE = 32
CLASSES = 10
ADVICE = "unpack cifar-10-binary.tar.gz, the binary version of CIFAR-10"


def images(path: Path, resolution: int) -> Images:
    """The training images."""
    if resolution != SIDE:
        raise ValueError(f"resolution is {resolution}, but the images of CIFAR-10 have {SIDE} pixels a side")
    folder = path / UNPACKED if (path / UNPACKED).is_dir() else path
    batches = [_batch(folder / name) for name in FILES]

    def read(index: int) -> Tensor:
        file, row = divmod(index, RECORDS)
        return torch.from_numpy(np.array(batches[file][row, 1:])).reshape(3, SIDE, SIDE)

    files = [(folder / name).stat() for name in FILES]
    stamp = " ".join(f"{found.st_size} {found.st_mtime_ns}" for found in files)
    return Images(len(FILES) * RECORDS, read, stamp)


def _batch(path: Path) -> np.ndarray:
    """The records of a file, which is read as far as it is used."""
    shape = (RECORDS, 1 + 3 * SIDE * SIDE)
    if not path.is_file():
        raise ValueError(f"{path} is missing: {ADVICE}")
    if path.stat().st_size != shape[0] * shape[1]:
        raise ValueError(f"{path} has {path.stat().st_size} bytes instead of {shape[0] * shape[1]}: {ADVICE}")
    records = np.memmap(path, np.uint8, "r", shape=shape)
    if records[:, 0].max() >= CLASSES:
        raise ValueError(f"{path} has a label above {CLASSES - 1}, so it is damaged or another file: {ADVICE}")
    return records


DATASET = Dataset("cifar10@1 (as they are)", images)
