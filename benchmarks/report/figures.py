"""Figures of the results page: from arrays to a matplotlib Figure, and from that to bytes."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from benchmarks.suite.record import Value

# Errors below this are drawn here: a feature that is looked up in full precision has none.
SMALLEST_ERROR = 1e-8
STYLES = ("-", "--", ":")
MARKERS = ("o", "s", "^")


def temporal_error(curves: Mapping[str, np.ndarray], timesteps: np.ndarray, title: str) -> Figure:
    """Error of the quantised time-step features over the denoising steps, a line a method.

    ``curves`` maps a method to its error at each step, shape (T,) (1 - cosine similarity to full precision, averaged
    over projections); ``timesteps`` [T] are the scheduler's values, and run from left to right, the largest first. A
    time step that the scheduler repeats has one point, at the mean. The legend has the order of the curves at their
    end.
    """
    steps, step = np.unique(timesteps, return_inverse=True)
    means = {name: np.bincount(step, curve) / np.bincount(step) for name, curve in curves.items()}
    figure = Figure(figsize=(9, max(3.6, 0.24 * len(curves) + 0.8)), layout="constrained")
    axes = figure.add_subplot()
    colours = colormaps["tab10"].colors
    lines = []
    for index, (name, curve) in enumerate(means.items()):
        style = STYLES[index // len(colours) % len(STYLES)]
        shown = np.maximum(curve, SMALLEST_ERROR)
        lines += axes.plot(steps, shown, style, marker=".", color=colours[index % len(colours)], label=name)
    axes.invert_xaxis()
    axes.set_yscale("log")
    floor = f"\n(below {SMALLEST_ERROR:g} drawn there)" if min(map(np.min, means.values())) < SMALLEST_ERROR else ""
    axes.set(title=title, xlabel="time step (noise to image)", ylabel=f"1 - cosine to full precision{floor}")
    ordered = sorted(lines, key=lambda line: -line.get_ydata()[0])
    figure.legend(handles=ordered, loc="outside right upper", fontsize="small")
    return figure


def sample_grid(images: Mapping[str, np.ndarray], columns: int = 8, titles: Sequence[str] = ()) -> Figure:
    """The first ``columns`` images of each method, a row a method: a column shows the same initial noise.

    ``images`` maps the row's label to uint8 images (N, 3, H, W); ``titles`` stand above the columns. Raises ValueError
    where a row has too few images.
    """
    short = [name for name, row in images.items() if len(row) < columns]
    if short:
        raise ValueError(f"{short[0]} has {len(images[short[0]])} images: the grid shows {columns} of each method")
    strips = [np.concatenate(row[:columns].transpose(0, 2, 3, 1), axis=1) for row in images.values()]
    gap = max(1, strips[0].shape[0] // 16)
    strips = [np.pad(strip, ((0, gap), (0, 0), (0, 0)), constant_values=255) for strip in strips]
    whole = np.concatenate(strips)[:-gap]
    above = [_short(title) for title in titles[:columns]]
    side, text = 0.62, 0.085 * max(len(name) for name in images) + 0.15
    top = 0.09 * (1 + max(title.count("\n") for title in above)) + 0.1 if above else 0.0
    width, height = side * columns, side * columns * whole.shape[0] / whole.shape[1]
    figure = Figure(figsize=(text + width, height + top))
    axes = figure.add_axes((text / (text + width), 0, width / (text + width), height / (height + top)))
    axes.imshow(whole, interpolation="nearest", aspect="auto")
    centres = [(index + 0.5) * strips[0].shape[0] - gap / 2 for index in range(len(strips))]
    axes.set_yticks(centres, images, fontsize=9)
    axes.set_xticks([(index + 0.5) * whole.shape[1] / columns for index in range(len(above))], above, fontsize=5)
    axes.tick_params(length=0, labelbottom=False, labeltop=True)
    axes.spines[:].set_visible(False)
    return figure


def _short(text: str) -> str:
    """A text in up to three lines that fit above an image, in capitals too."""
    return "\n".join(textwrap.wrap(text, 12, max_lines=3, placeholder=" …"))


def intervals(values: Mapping[str, Mapping[str, Value]], title: str, label: str) -> Figure:
    """A metric of every row with its interval: a panel a precision, a line a row.

    ``values`` maps precision -> row -> value; a row that lacks a precision leaves its place empty there.
    """
    rows = list(dict.fromkeys(name for panel in values.values() for name in panel))
    figure = Figure(figsize=(2.4 * len(values) + 2.4, 0.24 * len(rows) + 1.2), layout="constrained")
    panels = figure.subplots(1, len(values), sharey=True, squeeze=False)[0]
    for axes, (precision, panel) in zip(panels, values.items(), strict=True):
        for name, value in panel.items():
            margins = [[value.value - value.low], [value.high - value.value]]
            axes.errorbar(value.value, rows.index(name), xerr=margins, fmt="o", markersize=3, color="C0", capsize=2)
        axes.set_title(precision, fontsize=10)
        axes.grid(axis="y", linewidth=0.4, alpha=0.6)
        axes.tick_params(axis="x", labelsize=8)
    panels[0].set_yticks(range(len(rows)), rows, fontsize=8)
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    figure.suptitle(title, fontsize=10)
    figure.supxlabel(label, fontsize=9)
    return figure


def selection(cached: np.ndarray, projections: Sequence[str], timesteps: Sequence[int], title: str) -> Figure:
    """Which temporal features are looked up in the cache and which computed: booleans (P, T), projections x steps.

    A time step that the scheduler repeats has one column: the features depend on nothing else.
    """
    steps, first = np.unique(timesteps, return_index=True)
    cached, steps = cached[:, first[::-1]], steps[::-1]
    figure = Figure(figsize=(0.26 * len(steps) + 3.6, 0.2 * len(projections) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    axes.pcolormesh(cached.astype(float), cmap="Blues", vmin=0, vmax=1.4, edgecolors="white", linewidth=0.5)
    axes.set_yticks(np.arange(len(projections)) + 0.5, projections, fontsize=7)
    axes.set_xticks(np.arange(len(steps)) + 0.5, steps, fontsize=7, rotation=90)
    axes.invert_yaxis()
    axes.set_title(f"{title}: dark is cached, {cached.mean():.0%} of all", fontsize=9)
    axes.set_xlabel("time step (noise to image)", fontsize=8)
    return figure


def scatter(points: Mapping[str, tuple[float, float]], x: str, y: str, chosen: str) -> Figure:
    """A point each, named in the legend from top to bottom, ``chosen`` a star; the horizontal axis is logarithmic."""
    figure = Figure(figsize=(10, 5.5), layout="constrained")
    axes = figure.add_subplot()
    for index, (name, at) in enumerate(sorted(points.items(), key=lambda point: -point[1][1])):
        marker = "*" if name == chosen else MARKERS[index // 10 % len(MARKERS)]
        axes.plot(*at, marker, color=f"C{index % 10}", markersize=13 if name == chosen else 7, label=name)
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel=x, ylabel=y)
    axes.grid(linewidth=0.4, alpha=0.6)
    figure.legend(loc="outside right upper", fontsize="small")
    return figure


def strips(panels: Mapping[tuple[str, str], Mapping[str, Sequence[float]]]) -> Figure:
    """Repeats of each row as dots on a line: a row of panels for each first name, a column for each second one.

    Values of a panel are shown less their mean, in standard deviations between the means of its rows.
    """
    tasks, names = (list(dict.fromkeys(key[index] for key in panels)) for index in (0, 1))
    most = max(map(len, panels.values()))
    size = (4.4 * len(names) + 1.6, (0.2 * most + 0.7) * len(tasks))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(tasks), len(names), squeeze=False)
    for (task, name), rows in panels.items():
        axes = grid[tasks.index(task)][names.index(name)]
        first = panels[task, names[-1]]
        order = sorted(first, key=lambda row: float(np.mean(first[row])))
        means = np.array([np.mean(rows[row]) for row in order])
        middle, scale = means.mean(), means.std(ddof=1) or 1.0
        for place, row in enumerate(order):
            shown = (np.array(rows[row]) - middle) / scale
            axes.plot(shown, np.full(len(shown), place), "o", markersize=4, alpha=0.7, color="C0")
        axes.set_ylim(len(order) - 0.5, -0.5)
        axes.set_yticks(range(len(order)), order if name == names[0] else [""] * len(order), fontsize=7)
        axes.tick_params(axis="x", labelsize=7)
        axes.grid(axis="y", linewidth=0.4, alpha=0.6)
        axes.set_title(f"{task}: {name}", fontsize=8)
    return figure


def png(figure: Figure) -> bytes:
    """The figure as PNG without date or software version, so that equal figures are equal files."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()
