"""What every metric must do, and the paired metrics on images and features whose values are known."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio

import benchmarks.metrics
from benchmarks.features import Features
from benchmarks.metrics import Evidence, ReferenceStatistics, Value, metrics, reference_statistics

COUNT = 12
PAIRED = ("feature_distance", "perceptual", "psnr")


def features(count, seed, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return Features(*(torch.rand(count, width, generator=generator) + shift for width in (20, 30, 10)))


def images(seed):
    return torch.randint(0, 256, (COUNT, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def evidence():
    generator = torch.Generator().manual_seed(0)
    reference = features(40, 3)
    return Evidence(
        images=images(0),
        paired=images(1),
        features=features(COUNT, 0, shift=0.2),
        paired_features=features(COUNT, 1),
        perceptual_distance=torch.rand(COUNT, generator=generator),
        reference_features=reference,
        reference_statistics=reference_statistics(reference),
        data_statistics=reference_statistics(features(50, 4)),
        trajectory_error=torch.rand(COUNT, 5, generator=generator),
        temporal_error=torch.rand(5, 3, generator=generator),
        clip_cosines=torch.rand(COUNT, generator=generator) - 0.5,
    )


def score(name, evidence, seed=0):
    return metrics()[name].compute(evidence, torch.Generator().manual_seed(seed))


def test_files_are_the_columns_and_the_ranking_one_is_first():
    files = {path.stem for path in Path(benchmarks.metrics.__file__).parent.glob("[!_]*.py")}
    assert set(metrics()) == files
    assert next(iter(metrics())) == "kid_fp"
    positions = [metric.position for metric in metrics().values()]
    assert positions == sorted(set(positions))


@pytest.mark.parametrize("name", list(metrics()))
def test_every_metric_gives_a_value_and_repeats_it(name, evidence):
    value = score(name, evidence)
    assert isinstance(value, Value)
    assert value.low <= value.value <= value.high
    assert math.isfinite(value.low) and math.isfinite(value.high)
    assert value.n == (15 if name == "temporal_error" else COUNT)
    assert (value.low < value.high) == (name != "temporal_error")
    assert score(name, evidence) == value


@pytest.mark.parametrize("name", list(metrics()))
def test_full_precision_has_all_but_paired_metrics(name, evidence):
    alone = replace(
        evidence,
        paired=None,
        paired_features=None,
        perceptual_distance=None,
        trajectory_error=None,
        temporal_error=None,
    )
    assert (score(name, alone) is None) == (name in (*PAIRED, "noise_error", "temporal_error"))


@pytest.mark.parametrize("name", list(metrics()))
def test_titles(name):
    title = metrics()[name].title("FD", 512, "toy-clip 57934424")
    assert title and "{" not in title
    assert "FID" not in title


def test_titles_carry_the_distance_and_the_count():
    assert metrics()["fd_data"].title("FD", 512) == "FD512 to data"
    assert metrics()["sfd_data"].title("FID", 50_000) == "sFID50k to data"
    assert metrics()["fd_fp"].title("FID", 2048) == "FID2048 to FP"
    assert metrics()["kid_fp"].title("FD", 512) == "KID to FP"
    assert metrics()["is_score"].title("FD", 512) == "IS512"
    assert metrics()["clip_score"].title("FD", 512, "toy-clip 57934424") == "CLIP score (toy-clip 57934424)"


def test_identical_pairs(evidence):
    same = replace(evidence, paired=evidence.images, paired_features=evidence.features)
    assert score("feature_distance", same).value == pytest.approx(0, abs=1e-12)
    assert score("psnr", same).value == pytest.approx(10 * math.log10(255**2 * 12))


def test_pairs_are_symmetric(evidence):
    swapped = replace(
        evidence,
        images=evidence.paired,
        paired=evidence.images,
        features=evidence.paired_features,
        paired_features=evidence.features,
    )
    for name in PAIRED:
        assert score(name, swapped).value == pytest.approx(score(name, evidence).value, rel=1e-12)


def test_psnr_equals_torchmetrics(evidence):
    expected = peak_signal_noise_ratio(
        evidence.images.double(),
        evidence.paired.double(),
        data_range=255.0,
        dim=(1, 2, 3),
        reduction="elementwise_mean",
    )
    assert score("psnr", evidence).value == pytest.approx(expected.item(), rel=1e-6)


def test_feature_distance_of_orthogonal_features(evidence):
    pooled = torch.zeros(COUNT, 20)
    pooled[:, 0] = 2
    moved = torch.zeros(COUNT, 20)
    moved[:, 1] = 3
    moved[:3] = pooled[:3]
    pair = replace(
        evidence,
        features=replace(evidence.features, pooled=pooled),
        paired_features=replace(evidence.features, pooled=moved),
    )
    assert score("feature_distance", pair).value == pytest.approx(0.75)


def test_means(evidence):
    assert score("noise_error", evidence).value == pytest.approx(evidence.trajectory_error.mean().item())
    assert score("temporal_error", evidence).value == pytest.approx(evidence.temporal_error.mean().item())
    assert score("perceptual", evidence).value == pytest.approx(evidence.perceptual_distance.mean().item())
    assert score("clip_score", evidence).value == pytest.approx(100 * evidence.clip_cosines.mean().item())


@pytest.mark.parametrize("name", [name for name, metric in metrics().items() if metric.per_image])
def test_values_of_images_have_the_metric_as_their_mean(name, evidence):
    values = metrics()[name].per_image(evidence)
    assert values.shape == (COUNT,) and values.dtype == torch.float64
    assert values.mean().item() == pytest.approx(score(name, evidence).value, rel=1e-12)


def test_images_without_prompts_have_no_clip_score(evidence):
    assert score("clip_score", replace(evidence, clip_cosines=None)) is None


def test_distances_grow_with_a_shift(evidence):
    further = replace(evidence, features=features(COUNT, 0, shift=0.6))
    for name in ("kid_fp", "fd_fp", "fd_data", "sfd_data"):
        assert score(name, further).value > score(name, evidence).value


@pytest.mark.parametrize(
    ("field", "part"),
    [
        ("features", "pooled"),
        ("paired_features", "logits"),
        ("reference_features", "spatial"),
    ],
)
def test_features_that_are_not_finite_are_named(evidence, field, part):
    broken = getattr(evidence, field)
    tensor = getattr(broken, part).clone()
    tensor[4, 2] = math.nan
    with pytest.raises(ValueError, match=rf"{field}\.{part} holds 1 values that are not finite, the first at \[4, 2\]"):
        replace(evidence, **{field: replace(broken, **{part: tensor})})


@pytest.mark.parametrize("field", ["perceptual_distance", "trajectory_error", "temporal_error", "clip_cosines"])
def test_errors_that_are_not_finite_are_named(evidence, field):
    tensor = getattr(evidence, field).clone()
    tensor[1] = math.inf
    with pytest.raises(ValueError, match=field):
        replace(evidence, **{field: tensor})


def test_statistics_that_are_not_finite_are_named(evidence):
    broken = evidence.data_statistics
    moments = replace(broken.spatial, covariance=broken.spatial.covariance * math.nan)
    with pytest.raises(ValueError, match=r"data_statistics\.spatial\.covariance"):
        replace(evidence, data_statistics=replace(broken, spatial=moments))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(COUNT, 3, 8, 8)}, "uint8 images"),
        ({"images": torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "paired": None}, "three or more"),
        ({"paired": torch.zeros(COUNT, 3, 4, 4, dtype=torch.uint8)}, "cannot be paired"),
        ({"features": features(5, 0)}, "features has 5 rows"),
        ({"clip_cosines": torch.rand(5)}, "clip_cosines has 5 rows"),
    ],
)
def test_evidence_must_fit_together(evidence, change, message):
    with pytest.raises(ValueError, match=message):
        replace(evidence, **change)


def test_reference_statistics_survive_as_tensors(evidence):
    tensors = evidence.data_statistics.to_tensors()
    back = ReferenceStatistics.from_tensors(tensors)
    assert torch.equal(back.spatial.covariance, evidence.data_statistics.spatial.covariance)
    assert torch.equal(back.pooled.mean, evidence.data_statistics.pooled.mean)
    assert back.pooled.count == 50


@pytest.mark.parametrize("name", list(metrics()))
def test_three_images_are_enough(name, evidence):
    few = Evidence(
        images=evidence.images[:3],
        features=Features(*(tensor[:3] for tensor in vars(evidence.features).values())),
        reference_features=evidence.reference_features,
        reference_statistics=evidence.reference_statistics,
        data_statistics=evidence.data_statistics,
        paired=evidence.paired[:3],
        paired_features=Features(*(tensor[:3] for tensor in vars(evidence.paired_features).values())),
        perceptual_distance=evidence.perceptual_distance[:3],
        trajectory_error=evidence.trajectory_error[:3],
        temporal_error=evidence.temporal_error,
        clip_cosines=evidence.clip_cosines[:3],
    )
    assert math.isfinite(score(name, few).high)
