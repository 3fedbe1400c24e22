"""FFHQ (Karras et al., 2019), 70,000 faces of 1024 x 1024 pixels, as latent diffusion reads them.

Where: NVIDIA's repository `ffhq-dataset`, the folder `images1024x1024` (89 GB); the images have licences of their own,
the data set is CC BY-NC-SA 4.0. Layout: a folder, with sub-folders or not, of `00000.png` and so on. The thumbnails and
copies of 256 x 256 pixels are refused: their filter is another.

All images in the order of their numbers, or those that `images.txt` in the folder lists; folders in it do not matter.
Latent diffusion takes the 60,000 of taming-transformers' list `ffhqtrain.txt`: as `images.txt` it gives the reference
of latent diffusion's paper, which compares with all training images.

Each image: RGB, shrunk with OpenCV's bilinear filter, which does not average: at 256 a pixel is the mean of the middle
four of sixteen. It is what taming-transformers' loader does, through albumentations.
"""

from pathlib import Path

from benchmarks.datasets import Dataset, Images
from benchmarks.datasets._originals import Original, folder
from benchmarks.datasets._originals import images as read_originals
from benchmarks.datasets._resize import plain_bilinear

ORIGINAL = Original(
    names=r"\d{5}\.png",
    formats=("PNG",),
    advice="use images1024x1024 of FFHQ",
    side=1024,
)


def images(path: Path, resolution: int) -> Images:
    """The faces, at a resolution that divides 1024 by an even number."""
    return read_originals(folder(path, ORIGINAL), ORIGINAL, resolution, plain_bilinear)


DATASET = Dataset("ffhq-ldm@1 (bilinear without averaging)", images)
