"""MS-COCO 2014 (Lin et al., 2014), validation images, as squares.

Where: `val2014.zip` of cocodataset.org; the images have licences of their own (Flickr), the annotations are CC BY 4.0.
Layout: a folder, with sub-folders or not, of `COCO_val2014_000000000042.jpg` and so on, which are JPEG themselves. A
text file `images.txt` in it lists those to use, a path a line: those that the evaluation's captions belong to, without
which all 40,504 are used, in the order of their numbers.

Each image: RGB, centre square as wide as the shorter side, PIL's bicubic to the resolution. The papers say which images
they compare with, but not how these became squares; this is the way of latent diffusion's own loader of photographs.
"""

from pathlib import Path

from benchmarks.datasets import Dataset, Images
from benchmarks.datasets._originals import Original, folder
from benchmarks.datasets._originals import images as read_originals
from benchmarks.datasets._resize import centre_square

ORIGINAL = Original(
    names=r"COCO_val2014_\d{12}\.jpg",
    formats=("JPEG", "MPO"),
    advice="unpack val2014.zip of MS-COCO 2014",
)


def images(path: Path, resolution: int) -> Images:
    """The photographs."""
    return read_originals(folder(path, ORIGINAL), ORIGINAL, resolution, centre_square)


DATASET = Dataset("coco@1 (centre square, PIL bicubic)", images)
