"""What every metric must do, and the paired metrics on images and features whose values are known."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio

import benchmarks.metrics
from benchmarks.features import Features
from benchmarks.metrics import Evidence, References, ReferenceStatistics, Value, metrics, reference_statistics
from benchmarks.metrics._frechet import moments

COUNT, DATA_COUNT = 12, 50
# Those whose count is not that of the cell's images.
COUNTS = {"temporal_error": 15, "recall_data": DATA_COUNT}


def features(count, seed, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return Features(*(torch.rand(count, width, generator=generator) + shift for width in (20, 30, 10)))


@pytest.fixture(scope="module")
def evidence():
    generator = torch.Generator().manual_seed(0)
    samples, data = features(40, 3), features(DATA_COUNT, 4)
    return Evidence(
        features=features(COUNT, 0, shift=0.2),
        references=References(
            data_statistics=reference_statistics(data),
            samples=samples,
            samples_statistics=reference_statistics(samples),
            data_pooled=data.pooled,
            second_data=moments(features(30, 5).pooled),
        ),
        paired_features=features(COUNT, 1),
        squared_error=100 * torch.rand(COUNT, generator=generator).double(),
        perceptual_distance=torch.rand(COUNT, generator=generator),
        trajectory_error=torch.rand(COUNT, 5, generator=generator),
        temporal_error=torch.rand(5, 3, generator=generator),
        clip_cosines=torch.rand(2, COUNT, generator=generator) - 0.5,
        second_features=features(COUNT, 6, shift=0.2).pooled,
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
    assert value.n == COUNTS.get(name, COUNT)
    assert (value.low < value.high) == (name != "temporal_error")
    assert score(name, evidence) == value


@pytest.mark.parametrize("name", list(metrics()))
def test_full_precision_has_all_but_paired_metrics(name, evidence):
    alone = replace(
        evidence,
        squared_error=None,
        paired_features=None,
        perceptual_distance=None,
        trajectory_error=None,
        temporal_error=None,
    )
    assert (score(name, alone) is None) == metrics()[name].paired


def test_published_moments_alone_give_the_frechet_distances(evidence):
    data = evidence.references.data_statistics
    alone = replace(evidence, references=References(replace(data, spatial=None)), second_features=None)
    found = {name for name in metrics() if score(name, alone) is not None}
    missing = {"kid_fp", "fd_fp", "sfd_data", "fd_clean", "kid_data", "precision_data", "recall_data"}
    assert found == set(metrics()) - missing
    assert score("fd_data", alone) == score("fd_data", evidence)


@pytest.mark.parametrize("name", list(metrics()))
def test_titles(name):
    title = metrics()[name].title("FD", 512, ["toy-clip 57934424"], "second FD")
    assert title and "{" not in title
    assert "FID" not in title


def test_titles_carry_the_distance_and_the_count():
    assert metrics()["fd_data"].title("FD", 512) == "FD512 to data"
    assert metrics()["sfd_data"].title("FID", 50_000) == "sFID50k to data"
    assert metrics()["fd_fp"].title("FID", 2048) == "FID2048 to FP"
    assert metrics()["kid_fp"].title("FD", 512) == "KID to FP"
    assert metrics()["is_score"].title("FD", 512) == "IS512"
    assert metrics()["fd_clean"].title("FID", 50_000) == "clean FID50k to data"
    clips = ("ViT-B-32 openai 57934424", "ViT-g-14 laion2b_s12b_b42k 12345678")
    assert metrics()["clip_score"].title("FD", 512, clips) == "CLIP score (ViT-B-32 openai 57934424)"
    second = metrics()["clip_score_second"].title("FD", 512, clips)
    assert second == "CLIP score (ViT-g-14 laion2b_s12b_b42k 12345678)"
    assert metrics()["clip_score"].title("FD", 512) == "CLIP score (none)"


def test_identical_pairs(evidence):
    same = replace(evidence, squared_error=torch.zeros(COUNT).double(), paired_features=evidence.features)
    assert score("feature_distance", same).value == pytest.approx(0, abs=1e-12)
    assert score("psnr", same).value == pytest.approx(10 * math.log10(255**2 * 12))


def test_pairs_are_symmetric(evidence):
    swapped = replace(evidence, features=evidence.paired_features, paired_features=evidence.features)
    expected = score("feature_distance", evidence).value
    assert score("feature_distance", swapped).value == pytest.approx(expected, rel=1e-12)


def test_psnr_equals_torchmetrics(evidence):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(0, 256, (COUNT, 3, 8, 8), generator=generator).double() for _ in range(2))
    expected = peak_signal_noise_ratio(a, b, data_range=255.0, dim=(1, 2, 3), reduction="elementwise_mean")
    error = (a - b).square().mean(dim=(1, 2, 3))
    assert score("psnr", replace(evidence, squared_error=error)).value == pytest.approx(expected.item(), rel=1e-6)


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
    for name, cosines in zip(("clip_score", "clip_score_second"), evidence.clip_cosines, strict=True):
        assert score(name, evidence).value == pytest.approx(100 * cosines.mean().item())


@pytest.mark.parametrize("name", [name for name, metric in metrics().items() if metric.per_image])
def test_values_of_images_have_the_metric_as_their_mean(name, evidence):
    values = metrics()[name].per_image(evidence)
    assert values.shape == (COUNT,) and values.dtype == torch.float64
    assert values.mean().item() == pytest.approx(score(name, evidence).value, rel=1e-12)


def test_there_are_as_many_clip_scores_as_clips(evidence):
    alone = replace(evidence, clip_cosines=evidence.clip_cosines[:1])
    assert score("clip_score", alone) == score("clip_score", evidence)
    assert score("clip_score_second", alone) is None
    for name in ("clip_score", "clip_score_second"):
        assert score(name, replace(evidence, clip_cosines=None)) is None


def test_distances_grow_with_a_shift(evidence):
    moved = features(COUNT, 0, shift=0.6)
    further = replace(evidence, features=moved, second_features=moved.pooled)
    for name in ("kid_fp", "fd_fp", "fd_data", "sfd_data", "fd_clean", "kid_data"):
        assert score(name, further).value > score(name, evidence).value


@pytest.mark.parametrize(
    ("field", "part"),
    [
        ("features", "pooled"),
        ("paired_features", "logits"),
    ],
)
def test_features_that_are_not_finite_are_named(evidence, field, part):
    broken = getattr(evidence, field)
    tensor = getattr(broken, part).clone()
    tensor[4, 2] = math.nan
    with pytest.raises(ValueError, match=rf"{field}\.{part} holds 1 values that are not finite, the first at \[4, 2\]"):
        replace(evidence, **{field: replace(broken, **{part: tensor})})


@pytest.mark.parametrize(
    "field",
    [
        "squared_error",
        "perceptual_distance",
        "trajectory_error",
        "temporal_error",
        "clip_cosines",
        "second_features",
    ],
)
def test_errors_that_are_not_finite_are_named(evidence, field):
    tensor = getattr(evidence, field).clone()
    tensor[1] = math.inf
    with pytest.raises(ValueError, match=field):
        replace(evidence, **{field: tensor})


def test_statistics_that_are_not_finite_are_named(evidence):
    references = evidence.references
    statistics = references.data_statistics
    spatial = replace(statistics.spatial, covariance=statistics.spatial.covariance * math.nan)
    with pytest.raises(ValueError, match=r"references\.data_statistics\.spatial\.covariance"):
        replace(evidence, references=replace(references, data_statistics=replace(statistics, spatial=spatial)))
    with pytest.raises(ValueError, match=r"references\.data_pooled holds 1000 values"):
        replace(evidence, references=replace(references, data_pooled=references.data_pooled * math.nan))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": features(2, 0)}, "three or more images; got 2"),
        ({"features": features(5, 0)}, "There are 5 images, but paired_features has 12 rows"),
        ({"squared_error": torch.rand(5)}, "squared_error has 5 rows"),
        ({"second_features": torch.rand(5, 20)}, "second_features has 5 rows"),
        ({"clip_cosines": torch.rand(COUNT)}, r"clip_cosines has the shape \(12,\)"),
    ],
)
def test_evidence_must_fit_together(evidence, change, message):
    with pytest.raises(ValueError, match=message):
        replace(evidence, **change)


def test_reference_statistics_survive_as_tensors(evidence):
    statistics = evidence.references.data_statistics
    back = ReferenceStatistics.from_tensors(statistics.to_tensors())
    assert torch.equal(back.spatial.covariance, statistics.spatial.covariance)
    assert torch.equal(back.pooled.mean, statistics.pooled.mean)
    assert back.pooled.count == DATA_COUNT
    assert ReferenceStatistics.from_tensors(replace(statistics, spatial=None).to_tensors()).spatial is None


@pytest.mark.parametrize("name", list(metrics()))
def test_three_images_are_enough(name, evidence):
    few = Evidence(
        features=Features(*(tensor[:3] for tensor in vars(evidence.features).values())),
        references=evidence.references,
        paired_features=Features(*(tensor[:3] for tensor in vars(evidence.paired_features).values())),
        squared_error=evidence.squared_error[:3],
        perceptual_distance=evidence.perceptual_distance[:3],
        trajectory_error=evidence.trajectory_error[:3],
        temporal_error=evidence.temporal_error,
        clip_cosines=evidence.clip_cosines[:, :3],
        second_features=evidence.second_features[:3],
    )
    assert math.isfinite(score(name, few).high)
