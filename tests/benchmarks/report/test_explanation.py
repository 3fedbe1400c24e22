"""Sentences on temporal features follow from the rows."""

import numpy as np

from benchmarks.report import explanation
from benchmarks.suite.record import Cell

GAINS = {"prev": 0.0, "full_precision_temporal": -0.3, "tfmq": -0.2, "tiar": -0.15, "fsc": 0.12, "cache": -0.3}
ERRORS = {"prev": 1e-2, "tfmq": 1e-3}


def test_the_ablation_is_told_in_words(rows):
    for row, gain in GAINS.items():
        rows.add(row, -2.0 + gain, noise=0.001, temporal=ERRORS.get(row, 5e-3))
    steps = {
        Cell("emoji-ldm4", "prev", "w4a8"): np.linspace(0.03, 0.001, 12),
        Cell("emoji-ldm4", "tfmq", "w4a8"): np.full(12, 1e-4),
    }
    text = explanation.text(rows.judges, steps)
    # exp(-0.3) is 0.74, and the square of that 0.55.
    assert "deviation of the base's images falls by 26%" in text and "temporal features carry 45%" in text
    assert "10 times more exact" in text and "lowers the deviation by 18%" in text
    assert "its reconstruction alone lowers it by 14%" in text and "its calibration alone raises it by 13%" in text
    assert "off most at its noisy beginning" in text and "chance" not in text
    (row,) = [line for line in text.splitlines() if line.startswith("| emoji-ldm4")]
    fields = [field.strip() for field in row.split("|")[1:-1]]
    assert fields[2].startswith("0.74 [") and fields[7] == "–" and fields[8] == "45%" and fields[9] == "0.01 to 0.001"
    assert "Against Q-Diffusion" not in text


def test_what_is_no_more_than_chance_is_said_to_be(rows):
    for row, level in (("prev", -2.0), ("full_precision_temporal", -1.97)):
        rows.add(row, level, noise=0.2)
    assert "no more than chance" in explanation.text(rows.judges, {})


def test_what_does_not_move_is_said_to_stay(rows):
    """Nothing neither falls nor rises, nor is there less of it than nothing."""
    for row, level in {"prev": -2.0, "full_precision_temporal": -1.9999, "tfmq": -1.9999}.items():
        rows.add(row, level, noise=0.001)
    text = explanation.text(rows.judges, {})
    assert "images stays as it is [" in text and "TFMQ-DM leaves the deviation as it is [" in text
    assert "chance" not in text and "| 0% |" in text


def test_a_gain_beyond_exact_temporal_features_is_not_put_down_to_them(rows):
    for row, gain in {"prev": 0.0, "full_precision_temporal": -0.1, "tfmq": -0.2}.items():
        rows.add(row, -2.0 + gain, noise=0.001)
    assert "beyond exact temporal features is no gain in these" in explanation.text(rows.judges, {})


def test_gains_are_told_by_bits_and_model_and_error(rows):
    for index, task in enumerate(("one", "two")):
        for bits, precision in enumerate(("w8a8", "w4a8")):
            gain = 0.1 * (1 + 2 * index + bits)
            rows.add("qdiffusion", -2.0, noise=0.001, task=task, precision=precision, temporal=gain / 100)
            rows.add("tfmq", -2.0 - gain, noise=0.001, task=task, precision=precision, temporal=1e-5)
    text = explanation.text(rows.judges, {})
    assert "the smaller temporal error in 4 of 4 comparisons" in text and "in 4 of 4 (one at w8a8, " in text
    assert "0.82 at w8a8 (2 tasks), 0.74 at w4a8 (2 tasks)" in text
    assert "smallest on two" in text and "largest on one" in text
    assert "follows the size of the temporal error" in text and "1.00 over 4 comparisons" in text


def test_without_rows_there_is_nothing_to_say(rows):
    rows.add("tfmq", -2.0)
    assert explanation.text(rows.judges, {}) == explanation.text({}, {}) == ""


def test_what_changes_nothing_leaves_it_as_it_is(rows):
    for row, gain in {"prev": 0.0, "full_precision_temporal": -0.1, "tfmq": -0.2, "tiar": -0.2, "fsc": 0.001}.items():
        rows.add(row, -2.0 + gain, noise=0.0001)
    assert "its calibration alone leaves it as it is [" in explanation.text(rows.judges, {})
