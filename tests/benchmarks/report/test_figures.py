"""Figures: the same bytes each time, and nothing in them that misleads."""

import numpy as np
import pytest

from benchmarks.report import figures
from benchmarks.suite.record import Value


def test_figures_are_the_same_bytes_each_time():
    curves = {"nearest": np.array([0.1, 0.2, 0.3]), "tfmq": np.array([0.01, 0.02, 0.0])}
    images = {name: np.full((3, 3, 8, 8), index, dtype=np.uint8) for index, name in enumerate(curves)}
    for draw in (
        lambda: figures.temporal_error(curves, np.array([900, 500, 1]), "emoji-ldm4 w4a8"),
        lambda: figures.sample_grid(images, columns=3),
        lambda: figures.sample_grid(images, columns=3, titles=["a prompt of many words that is cut", "red", "b"]),
        lambda: figures.intervals({"w4a8": {"tfmq": Value(0.2, 0.1, 0.3, 9)}, "w8a8": {}}, "emoji-ldm4", "Distance"),
        lambda: figures.scatter({"a": (3.0, 0.5), "b": (200.0, 0.9)}, "F", "agreement", "b"),
        lambda: figures.strips({("one", "a"): {"tfmq": [1.0, 1.1], "nearest": [2.0, 2.2]}}),
        lambda: figures.selection(np.array([[True, False], [True, True]]), ["a", "b"], [1, 900], "tfmq"),
    ):
        first = figures.png(draw())
        assert first.startswith(b"\x89PNG")
        assert first == figures.png(draw())
        assert b"Software" not in first and b"tIME" not in first


def test_a_grid_needs_enough_images():
    with pytest.raises(ValueError, match="tfmq has 2 images: the grid shows 8"):
        figures.sample_grid({"tfmq": np.zeros((2, 3, 8, 8), dtype=np.uint8)})


def test_a_sample_grid_is_filled_by_its_images():
    images = {f"row {index}": np.full((10, 3, 32, 32), index, dtype=np.uint8) for index in range(12)}
    figure = figures.sample_grid(images, columns=10)
    (axes,) = figure.axes
    box = axes.get_position()
    assert box.x1 == pytest.approx(1) and (box.y0, box.y1) == (0, 1)
    assert [label.get_text() for label in axes.get_yticklabels()] == list(images)


def test_curves_are_told_apart_and_named_in_the_order_of_their_ends():
    curves = {f"row {index}": np.full(4, 10.0**-index) for index in range(15)}
    figure = figures.temporal_error(curves, np.array([900, 600, 300, 1]), "emoji-ldm4")
    lines = figure.axes[0].get_lines()
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 15
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert named[:3] == ["row 0", "row 1", "row 2"]


def test_a_floor_is_named_where_it_is_used():
    timesteps = np.array([900, 600, 1])
    drawn = figures.temporal_error({"a": np.array([0.1, 0.0, 0.2])}, timesteps, "").axes[0]
    assert min(line.get_ydata().min() for line in drawn.get_lines()) == figures.SMALLEST_ERROR
    assert drawn.get_ylabel() == "1 - cosine to full precision\n(below 1e-08 drawn there)"
    drawn = figures.temporal_error({"a": np.array([0.1, 0.3, 0.2])}, timesteps, "").axes[0]
    assert drawn.get_ylabel() == "1 - cosine to full precision"


def test_a_repeated_time_step_is_one_point():
    curves = {"a": np.array([0.1, 0.2, 0.4, 0.8]), "b": np.array([0.4, 0.3, 0.3, 0.9])}
    figure = figures.temporal_error(curves, np.array([951, 901, 901, 1]), "")
    first, second = figure.axes[0].get_lines()
    assert first.get_xdata().tolist() == [1, 901, 951]
    np.testing.assert_allclose(first.get_ydata(), [0.8, 0.3, 0.1])
    np.testing.assert_allclose(second.get_ydata(), [0.9, 0.3, 0.4])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["b", "a"]
    cached = np.array([[True, False, False, True], [False, False, False, True]])
    axes = figures.selection(cached, ["p", "q"], [951, 901, 901, 1], "tfmq").axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["951", "901", "1"]
    assert axes.collections[0].get_array().tolist() == [[1, 0, 1], [0, 0, 1]]
    assert "50% of all" in axes.get_title()


def test_prompts_stand_above_their_columns():
    images = {"row": np.zeros((4, 3, 16, 16), dtype=np.uint8)}
    titles = ["red heart", "a prompt of so many words that not all of them can be shown here", "c", "d", "e"]
    figure = figures.sample_grid(images, columns=4, titles=titles)
    (axes,) = figure.axes
    shown = [label.get_text() for label in axes.get_xticklabels()]
    assert shown[0] == "red heart" and shown[2:] == ["c", "d"]
    assert shown[1].count("\n") == 2 and shown[1].endswith("…")
    assert axes.get_xticks().tolist() == [8.0, 24.0, 40.0, 56.0]
    assert axes.get_position().y1 < 1


def test_every_point_is_told_apart_and_the_chosen_one_stands_out():
    points = {str(index): (30.0 - index, 0.5 + index) for index in range(13)}
    figure = figures.scatter(points, "F", "agreement", "4")
    lines = figure.axes[0].lines
    assert [text.get_text() for text in figure.legends[0].get_texts()] == sorted(points, key=points.get)
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == len(points)
    assert [line.get_label() for line in lines if line.get_marker() == "*"] == ["4"]
    assert figure.axes[0].get_xscale() == "log"


def test_strips_compare_spreads_in_one_unit():
    rows = {"tfmq": [1.0, 1.2], "nearest": [3.0, 3.4], "ptqd": [2.0, 2.0]}
    scaled = {name: [100 * value for value in values] for name, values in rows.items()}
    figure = figures.strips({("one", "a"): rows, ("one", "b"): scaled})
    left, right = ([line.get_xdata() for line in axes.get_lines()] for axes in figure.axes)
    np.testing.assert_allclose(left, right)
    # The best row, of the mean 1.1, is on top; the means 1.1, 2 and 3.2 have the standard deviation 1.05.
    assert left[0] == pytest.approx((np.array(rows["tfmq"]) - 2.1) / np.std([1.1, 3.2, 2.0], ddof=1))
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["tfmq", "ptqd", "nearest"]
