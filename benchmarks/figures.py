"""Figures of the results page: from arrays to a matplotlib Figure, and from that to bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure


def temporal_error(curves: Mapping[str, np.ndarray], timesteps: np.ndarray, title: str) -> Figure:
    """Error of the quantised time-step features over the denoising steps, a line a method.

    ``curves`` maps a method to its error at each step, shape [T] (1 - cosine similarity to full precision, averaged
    over projections); ``timesteps`` [T] are the scheduler's values, largest first, and run from left to right.
    """
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for name, curve in curves.items():
        axes.plot(timesteps, curve, marker=".", label=name)
    axes.invert_xaxis()
    axes.set_yscale("log" if all((curve > 0).all() for curve in curves.values()) else "linear")
    axes.set(title=title, xlabel="time step (noise to image)", ylabel="1 - cosine to full precision")
    axes.legend()
    return figure


def sample_grid(images: Mapping[str, np.ndarray], columns: int = 8) -> Figure:
    """The first ``columns`` images of each method, a row a method: a column shows the same initial noise.

    ``images`` maps the row's label to uint8 images [N, 3, H, W]. Raises ValueError where a row has too few images.
    """
    short = [name for name, row in images.items() if len(row) < columns]
    if short:
        raise ValueError(f"{short[0]} has {len(images[short[0]])} images: the grid shows {columns} of each method")
    figure = Figure(figsize=(0.9 * columns + 1.6, 0.9 * len(images)), layout="constrained")
    grid = figure.subplots(len(images), 1, squeeze=False)[:, 0]
    for axes, (name, row) in zip(grid, images.items(), strict=True):
        axes.imshow(np.concatenate(row[:columns].transpose(0, 2, 3, 1), axis=1), interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
        axes.set_ylabel(name, rotation=0, ha="right", va="center")
    return figure


def png(figure: Figure) -> bytes:
    """The figure as PNG without date or software version, so that equal figures are equal files."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()
