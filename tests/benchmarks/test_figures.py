"""Figures: the same bytes each time, and nothing in them that misleads."""

import numpy as np
import pytest

from benchmarks import figures
from benchmarks.record import Value


def test_figures_are_the_same_bytes_each_time():
    curves = {"nearest": np.array([0.1, 0.2, 0.3]), "tfmq": np.array([0.01, 0.02, 0.0])}
    images = {name: np.full((3, 3, 8, 8), index, dtype=np.uint8) for index, name in enumerate(curves)}
    for draw in (
        lambda: figures.temporal_error(curves, np.array([900, 500, 1]), "emoji-ldm4 w4a8"),
        lambda: figures.sample_grid(images, columns=3),
        lambda: figures.intervals({"w4a8": {"tfmq": Value(0.2, 0.1, 0.3, 9)}, "w8a8": {}}, "emoji-ldm4", "Distance"),
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
    assert min(line.get_ydata().min() for line in lines) == figures.SMALLEST_ERROR
