"""The papers' ways to a square, against the same done by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.datasets._resize import centre_square, halved_then_centre, plain_bilinear
from tests.benchmarks.datasets.originals import picture


@pytest.mark.parametrize(("width", "height"), [(41, 30), (30, 41), (30, 30), (17, 64)])
def test_latent_diffusion_crops_in_the_middle_and_resizes_with_pil(width, height):
    image = picture(width, height, 0)
    array = np.array(image)
    side = min(array.shape[:2])
    rows, columns = ((length - side) // 2 for length in array.shape[:2])
    square = array[rows : rows + side, columns : columns + side]
    expected = Image.fromarray(square).resize((12, 12), resample=Image.BICUBIC)
    assert np.array_equal(np.array(centre_square(image, 12)), np.array(expected))


def test_a_square_of_the_right_size_stays_as_it_is():
    image = picture(24, 24, 1)
    assert np.array_equal(np.array(centre_square(image, 24)), np.array(image))
    assert np.array_equal(np.array(halved_then_centre(image, 24)), np.array(image))


def means(array: np.ndarray, axis: int) -> np.ndarray:
    """Means of neighbours, halves up: what a box filter over two pixels leaves in eight bits."""
    first, second = (array.take(range(start, array.shape[axis], 2), axis).astype(int) for start in (0, 1))
    return (first + second + 1) // 2


def test_adm_halves_by_averaging_first():
    image = picture(1024, 1024, 2)
    expected = np.array(image)
    for _ in range(2):
        expected = means(means(expected, 1), 0)
    assert np.array_equal(np.array(halved_then_centre(image, 256)), expected)


def test_adm_halves_no_further_than_to_the_resolution_and_then_crops():
    image = picture(206, 140, 3)
    halved = Image.fromarray(means(means(np.array(image), 1), 0).astype(np.uint8))
    assert halved.size == (103, 70)
    resized = np.array(halved.resize((round(103 * 64 / 70), 64), Image.BICUBIC))
    left = (resized.shape[1] - 64) // 2
    assert left == 15
    assert np.array_equal(np.array(halved_then_centre(image, 64)), resized[:, left : left + 64])


def test_adm_enlarges_what_is_small():
    image = picture(20, 30, 4)
    resized = np.array(image.resize((64, 96), Image.BICUBIC))
    assert np.array_equal(np.array(halved_then_centre(image, 64)), resized[16:80])


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_taming_transformers_does_not_average(factor):
    image = picture(16 * factor, 16 * factor, 5)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].double()
    plain = torch.nn.functional.interpolate(pixels, size=(16, 16), mode="bilinear", antialias=False)
    expected = (plain[0] + 0.5).floor().permute(1, 2, 0).numpy()
    found = np.array(plain_bilinear(image, 16))
    assert np.array_equal(found, expected)
    averaged = np.array(image.resize((16, 16), Image.BILINEAR)).astype(float)
    assert np.abs(averaged - found).max() > 3


def test_faces_are_shrunk_by_an_even_factor_only():
    with pytest.raises(ValueError, match="resolution is 24, but faces of 64 pixels are shrunk by an even factor"):
        plain_bilinear(picture(64, 64, 6), 24)
    with pytest.raises(ValueError, match="even factor"):
        plain_bilinear(picture(48, 48, 6), 16)
