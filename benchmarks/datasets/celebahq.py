"""CelebA-HQ (Karras et al., 2018), 30,000 faces of 1024 x 1024 pixels, as latent diffusion reads them.

Where: the authors' `progressive_growing_of_gans` says how to make the images from CelebA and their deltas; CelebA is
for non-commercial research. The result is `imgHQ00000.npy` and so on, which lose nothing when written as PNG. Layout: a
folder, with sub-folders or not, of `imgHQ00000.png` or `00000.png` and so on. The JPEG images of CelebAMask-HQ and
copies of 256 x 256 pixels are refused: both are encoded again.

All images in the order of their numbers, or those that `images.txt` in the folder lists; suffixes in it do not matter.
Latent diffusion takes the 25,000 of taming-transformers' list `celebahqtrain.txt` (`imgHQ00562.npy` and so on): as
`images.txt` it gives the reference of latent diffusion's paper, which compares with all training images.

Each image: RGB, shrunk with OpenCV's bilinear filter, which does not average: at 256 a pixel is the mean of the middle
four of sixteen. It is what taming-transformers' loader does, through albumentations.
"""

from pathlib import Path

from benchmarks.datasets import Dataset, Images
from benchmarks.datasets._originals import Original, folder
from benchmarks.datasets._originals import images as read_originals
from benchmarks.datasets._resize import plain_bilinear

ORIGINAL = Original(
    names=r"(imgHQ)?\d{5}\.png",
    formats=("PNG",),
    advice="make the PNG images of 1024 x 1024 pixels as the authors of CelebA-HQ say",
    side=1024,
)


def images(path: Path, resolution: int) -> Images:
    """The faces, at a resolution that divides 1024 by an even number."""
    return read_originals(folder(path, ORIGINAL), ORIGINAL, resolution, plain_bilinear)


DATASET = Dataset("celebahq-ldm@1 (bilinear without averaging)", images)
