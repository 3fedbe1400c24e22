from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.features import (
    Evaluator,
    Extractor,
    Features,
    compare,
    concatenate,
    extract,
    extract_with_maps,
    extractor,
    load_evaluator,
    perceptual_distance,
    resize,
    unit_maps,
)
from benchmarks.suite import discover


class Colour(nn.Module):
    """Features that can be worked out by hand."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def forward(self, images):
        self.batches.append(len(images))
        maps = images.float()
        pooled = maps.mean(dim=(2, 3))
        return Features(pooled=pooled, spatial=maps.flatten(1), logits=-pooled), (maps,)


def evaluator():
    colour = Extractor("colour", 3, 8, 4, "FD", weights="colour", keeps_maps=True, load=lambda path: Colour())
    return Evaluator(colour, "0123456789abcdef", torch.device("cpu"), Colour())


def images(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator)


def test_extract_keeps_order_and_batch():
    measured = evaluator()
    features = extract(measured, images(10))
    assert measured.network.batches == [4, 4, 2]
    assert torch.equal(features.pooled, images(10).float().mean(dim=(2, 3)))
    assert len(features) == 10
    assert not features.pooled.is_inference()


def test_compare_gives_what_extract_gives():
    measured, a, b = evaluator(), images(6), images(6, seed=1)
    paired, maps = extract_with_maps(measured, b)
    assert torch.equal(paired.spatial, extract(measured, b).spatial)
    assert [layer.shape for layer in maps] == [(6, 3, 8, 8)]
    features, distance = compare(measured, a, maps)
    assert torch.equal(features.pooled, extract(measured, a).pooled)
    assert distance.shape == (6,)
    # The distance of the maps as they were before they were kept in half precision
    exact = (nn.functional.normalize(a.double(), dim=1) - nn.functional.normalize(b.double(), dim=1)).square()
    torch.testing.assert_close(distance.double(), exact.sum(dim=1).mean(dim=(1, 2)), rtol=1e-3, atol=0)
    assert compare(measured, b, maps)[1].abs().max() == 0


def test_perceptual_distance_of_known_maps():
    # Orthogonal at one of four positions of the first map, opposite everywhere in the second.
    a = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 2, 2).clone()
    b = 3 * a
    b[0, :, 0, 0] = torch.tensor([0.0, 5.0])
    assert perceptual_distance(unit_maps((a, a)), unit_maps((b, -a))).item() == pytest.approx((2 / 4 + 4) / 2)


def test_identity_says_version_resize_and_weights():
    assert evaluator().identity == "colour@3-8px-01234567"


@pytest.mark.parametrize(
    "wrong",
    [torch.zeros(2, 3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(0, 3, 8, 8, dtype=torch.uint8)],
)
def test_images_must_be_uint8_batches(wrong):
    with pytest.raises(ValueError, match="uint8 images of shape"):
        extract(evaluator(), wrong)


def test_pairs_must_match():
    for count in (2, 4):
        maps = extract_with_maps(evaluator(), images(count))[1]
        with pytest.raises(ValueError, match="3 images are compared in pairs, but the maps have"):
            compare(evaluator(), images(3), maps)


def test_features_need_equal_rows():
    with pytest.raises(ValueError, match="one row an image"):
        Features(torch.zeros(2, 3), torch.zeros(3, 3), torch.zeros(2, 3))


def test_concatenate_keeps_order():
    parts = [Features(*(torch.full((count, 2), float(count)) for _ in range(3))) for count in (1, 2)]
    assert concatenate(parts).spatial[:, 0].tolist() == [1.0, 2.0, 2.0]


def test_resize_averages_when_it_shrinks():
    checkerboard = (torch.arange(16).view(4, 4) % 2 * 200).to(torch.uint8).expand(1, 3, 4, 4)
    assert resize(checkerboard, 1).flatten().tolist() == pytest.approx([100.0] * 3)


def test_unknown_evaluator_names_the_nearest():
    with pytest.raises(ValueError, match="efficientnet_lite0"):
        load_evaluator("efficientnet_lite", Path("absent.safetensors"))


@pytest.mark.parametrize("name", discover.names("benchmarks.features"))
def test_every_extractor_is_named_after_its_file(name):
    found = extractor(name)
    assert found.name == name
    assert found.weights and "_" not in found.weights
    assert (found.distance_label == "FID") == (name == "inception")
