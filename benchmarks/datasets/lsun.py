"""LSUN scenes (Yu et al., 2015), such as church_outdoor with 126,227 training images, as latent diffusion reads them.

Where: the databases `<category>_train_lmdb.zip` of LSUN's own site (yf.io/p/lsun), for research. Layout, either
- the unpacked database: a folder with `data.mdb` (this takes the package lmdb), or
- its images as LSUN's script exports them, flat or in sub-folders: `<40 hexadecimal digits>.webp` or `.jpg`. The script
  writes the stored bytes, so nothing is encoded again. The originals are lossy: a PNG here is a copy.

All images, in the order of their names (hashes, so any beginning is a random sample), or those that `images.txt` in the
folder lists; folders and suffixes in it do not matter. Latent diffusion splits the images in two, and its lists are
public beside its models: its training list as `images.txt` gives the reference of its paper, which compares with all
training images.

Each image: RGB, centre square as wide as the shorter side, PIL's bicubic to the resolution. Latent diffusion's loader
flips half of the images at random while it trains; here none is, since a reference must not depend on chance.
Transparency is dropped, as it does.
"""

from pathlib import Path

from benchmarks.datasets import Dataset, Images
from benchmarks.datasets._lmdb import DATABASE, database
from benchmarks.datasets._originals import Original, folder
from benchmarks.datasets._originals import images as read_originals
from benchmarks.datasets._resize import centre_square

ORIGINAL = Original(
    names=r"[0-9a-f]{40}\.(webp|jpg)",
    formats=("WEBP", "JPEG"),
    advice="use LSUN's own database, or its images as LSUN's script exports them, <40 hexadecimal digits>.webp",
    shorter=256,
    as_stored=True,
)


def images(path: Path, resolution: int) -> Images:
    """The images of an LSUN category, from its database or its exported files."""
    files = (database if (path / DATABASE).is_file() else folder)(path, ORIGINAL)
    return read_originals(files, ORIGINAL, resolution, centre_square)


DATASET = Dataset("lsun-ldm@1 (centre square, PIL bicubic)", images)
