"""From an image of any size to a square, in the ways of the papers' own loaders, which all give other pixels."""

from __future__ import annotations

import numpy as np
from PIL import Image


def centre_square(image: Image.Image, resolution: int) -> Image.Image:
    """The centre square as wide as the shorter side, resized with PIL's bicubic filter, which averages when it shrinks.

    Latent diffusion's loader of LSUN, after score_sde; without its random flip.
    """
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return square.resize((resolution, resolution), Image.Resampling.BICUBIC)


def halved_then_centre(image: Image.Image, resolution: int) -> Image.Image:
    """Both sides halved by averaging while the shorter is at least twice the resolution, then bicubic, then the centre.

    The loader of ADM (guided-diffusion), whose reference batches are made with it.
    """
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))


def plain_bilinear(image: Image.Image, resolution: int) -> Image.Image:
    """A square shrunk by an even factor with OpenCV's bilinear filter, which does not average when it shrinks.

    A new pixel's centre lies between the middle two of as many old ones, both ways, so it is the mean of these four,
    rounded to nearest with halves up. The loader of taming-transformers, which latent diffusion uses for faces (there
    through albumentations, whose default filter it is). Raises ValueError for another factor.
    """
    factor, rest = divmod(image.width, resolution)
    if rest or factor % 2:
        raise ValueError(f"resolution is {resolution}, but faces of {image.width} pixels are shrunk by an even factor")
    blocks = np.asarray(image).reshape(resolution, factor, resolution, factor, 3)
    middle = slice(factor // 2 - 1, factor // 2 + 1)
    sums = blocks[:, middle, :, middle].sum(axis=(1, 3), dtype=np.uint16)
    return Image.fromarray(((sums + 2) // 4).astype(np.uint8))
