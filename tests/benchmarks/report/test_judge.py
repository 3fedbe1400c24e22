"""Two rows compared over their images and seeds."""

import numpy as np
import pytest
from scipy.stats import ttest_rel

from benchmarks.report.statistic import RANKED_BY

MEASURE = RANKED_BY.name


def test_a_comparison_is_paired_by_image(rows):
    rows.add("tfmq", -2.0, noise=0.05)
    rows.add("qdiffusion", -1.9, noise=0.05)
    judge = rows.judges["emoji-ldm4"]
    found = judge.compare(MEASURE, "tfmq", "qdiffusion", "w4a8").estimate
    amplitudes = [np.log(rows.values[record.cell]["noise_error"]) for record in rows.records]
    expected = ttest_rel(*amplitudes)
    assert found.p == pytest.approx(expected.pvalue)
    assert found.mean == pytest.approx(np.mean(amplitudes[0] - amplitudes[1]))
    assert np.exp(judge.mean(MEASURE, "tfmq", "w4a8")) == pytest.approx(np.exp(amplitudes[0].mean()))


def test_only_seeds_that_both_have_are_compared(rows):
    for seed, level in enumerate((-2.0, -2.1, -1.9)):
        rows.add("tfmq", level, seed=seed)
    rows.add("prev", -1.7)
    judge = rows.judges["emoji-ldm4"]
    found = judge.compare(MEASURE, "tfmq", "prev", "w4a8")
    assert found.parts.seeds == 1 and found.parts.mean == pytest.approx(-0.3)
    assert judge.compare(MEASURE, "tfmq", "absent", "w4a8") is None
    assert judge.compare(MEASURE, "tfmq", "prev", "w8a8") is None
    assert judge.mean(MEASURE, "absent", "w4a8") is None


def test_a_precision_of_one_seed_borrows_from_that_of_several(rows):
    generator = np.random.default_rng(3)
    for row in ("tfmq", "prev", "tiar", "fsc", "cache"):
        for seed in range(3):
            rows.add(row, -2 + 0.2 * generator.normal(), noise=0.05, seed=seed)
    rows.add("tfmq", -3.0, noise=0.05, precision="w8a8")
    rows.add("prev", -2.9, noise=0.05, precision="w8a8")
    judge = rows.judges["emoji-ldm4"]
    found = judge.compare(MEASURE, "tfmq", "prev", "w8a8")
    # Seeds move a row by 0.2 and images leave 0.05 / sqrt(32), so a decided difference of images is none of seeds.
    assert 150 < found.borrowed.ratio < 2000
    assert 0.15 < found.estimate.error < 0.6 and found.estimate.p > 0.3
    rows.records = [record for record in rows.records if record.seed == 0]
    assert rows.judges["emoji-ldm4"].compare(MEASURE, "tfmq", "prev", "w8a8").estimate.p < 1e-3


def seeded(rows, precision, spread, count=3, names=("tfmq", "prev", "tiar", "fsc", "cache")):
    """Add rows whose calibration seeds move them by so much."""
    generator = np.random.default_rng(3)
    for row in names:
        for seed in range(count):
            rows.add(row, -2 + spread * generator.normal(), noise=0.05, seed=seed, precision=precision)


def test_a_precision_with_seeds_of_its_own_borrows_from_no_other(rows):
    seeded(rows, "w4a8", 0.02)
    alone = rows.judges["emoji-ldm4"].borrowed(MEASURE, True, "w4a8")
    seeded(rows, "w8a8", 0.2)
    for row in ("tfmq", "prev"):
        rows.add(row, -1.0, noise=0.05, precision="w4a4")
    judge = rows.judges["emoji-ldm4"]
    other, mixed = (judge.borrowed(MEASURE, True, precision) for precision in ("w8a8", "w4a4"))
    assert judge.borrowed(MEASURE, True, "w4a8") == alone
    assert other.ratio > 20 * alone.ratio and alone.ratio < mixed.ratio < other.ratio
    assert [judge.has_seeds(precision) for precision in ("w4a8", "w8a8", "w4a4")] == [True, True, False]


def test_one_row_with_more_seeds_leaves_what_the_others_lend(rows):
    seeded(rows, "w4a8", 0.2)
    rows.add("tfmq", -1.0, precision="w4a4")
    before = rows.judges["emoji-ldm4"].borrowed(MEASURE, True, "w4a4")
    seeded(rows, "w8a8", 0.2, count=4, names=("groupwise",))
    assert rows.judges["emoji-ldm4"].borrowed(MEASURE, True, "w4a4") == before and before.degrees > 1


def test_a_metric_without_images_is_judged_over_seeds(rows):
    for seed, (own, other) in enumerate(((1e-4, 3e-4), (2e-4, 5e-4), (1e-4, 4e-4))):
        rows.add("tfmq", -2.0, seed=seed, temporal=own)
        rows.add("prev", -2.0, seed=seed, temporal=other)
    rows.add("tfmq", -2.0, temporal=0.0, precision="w8a8")
    rows.add("prev", -2.0, temporal=0.0, precision="w8a8")
    judge = rows.judges["emoji-ldm4"]
    found = judge.compare("temporal_error", "tfmq", "prev", "w4a8").estimate
    assert found.mean == pytest.approx(np.log([1 / 3, 2 / 5, 1 / 4]).mean()) and found.degrees == 2
    # One pair of rows lends nothing.
    assert judge.compare("temporal_error", "tfmq", "prev", "w8a8").estimate is None


def test_rows_together_have_the_covariance_of_their_images(rows):
    rows.add("tfmq", -2.0, noise=0.1)
    rows.add("prev", -1.0, noise=0.2)
    means, covariance = rows.judges["emoji-ldm4"].joint(MEASURE, ["tfmq", "prev"], "w4a8")
    images = np.log([rows.values[record.cell]["noise_error"] for record in rows.records])
    np.testing.assert_allclose(means, images.mean(1))
    np.testing.assert_allclose(covariance, np.cov(images) / images.shape[1])


def test_what_was_not_measured_takes_no_part(rows, make_record):
    rows.records.append(make_record(method="ptqd", status="failed", reason="x", metrics={}, cost=None))
    rows.add("full_precision", -9.0, precision="w32a32")
    assert rows.judges["emoji-ldm4"].records == {}
