"""The charts of the page in the grammar of Vega-Lite, and the numbers behind them. Nothing here touches files.

A chart is bound to the page's controls: `task`, `precision`, `metric` and `method` are Vega's signals, each the value
of the element that is named. Colours of text and axes are those of the page around, so that both themes fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.metrics import Metric
from benchmarks.report.figures import SMALLEST_ERROR
from benchmarks.report.tables import QUALITY, label, row_label
from benchmarks.runtime.excerpt import Excerpt
from benchmarks.suite.record import FULL_PRECISION, SHARED, SIMULATED, Cell, Record

Spec = dict[str, object]

# Significant digits of numbers that are only drawn.
DIGITS = 5
# From many bits to few. Colours that those who confuse red and green tell apart, on white and on black.
COLOURS = {"w32a32": "#8c8c8c", "w8a8": "#0f9bd7", "w4a32": "#c77cff", "w4a8": "#e69f00", "w4a4": "#d1495b"}
OTHER_COLOUR = "#3a9d5d"
NO_METHOD = "none"
# A legend of shapes alone has the colour of the text.
SHAPES: Spec = {"symbolFillColor": "currentColor", "symbolStrokeColor": "currentColor"}
# The second legend of a chart whose first one takes the width of a telephone.
ABOVE: Spec = {"title": None, "orient": "top", "columns": 2}
CONFIG: Spec = {
    "background": "transparent",
    "view": {"stroke": None},
    "axis": {
        "labelColor": "currentColor",
        "titleColor": "currentColor",
        "domainColor": "currentColor",
        "tickColor": "currentColor",
        "gridColor": "currentColor",
        "gridOpacity": 0.15,
        "domainOpacity": 0.5,
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
    },
    "legend": {
        "labelColor": "currentColor",
        "titleColor": "currentColor",
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "orient": "bottom",
        "symbolOpacity": 1,
        "symbolStrokeWidth": 2,
        "unselectedOpacity": 0.55,
    },
    "title": {"color": "currentColor", "anchor": "start", "fontSize": 14, "fontWeight": 600},
    "text": {"color": "currentColor", "fontSize": 12},
}


def datasets(
    records: Sequence[Record],
    excerpts: Mapping[Cell, Excerpt],
    metrics: Mapping[str, Metric],
    latency: Sequence[Mapping],
) -> dict[str, list[Spec]]:
    """The numbers of all charts by the names that the charts know them by.

    ``cells`` has the measured, quantised rows of seed 0 with ``metrics``; ``curves`` their temporal errors over time
    steps, and ``engines`` what executes the networks of ``latency``, the files of `results/latency`.
    """
    shown = [record for record in records if record.seed == 0 and record.metrics and record.method != FULL_PRECISION]
    cells, curves = [], []
    for record in shown:
        about = {
            "task": record.task,
            "precision": record.precision,
            "row": row_label(record),
            "method": label(record.method),
            "kind": _kind(record),
            "href": f"#{record.cell.name}",
        }
        cost: Spec = {"size": _round(record.cost.size_mib), "seconds": _round(record.cost.quantization_seconds)}
        values: Spec = {}
        for name in metrics:
            if name in record.metrics:
                value = record.metrics[name]
                ends = {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}
                values |= {key: _round(end) for key, end in ends.items()}
        cells.append(about | cost | values)
        found = excerpts[record.cell]
        if found.temporal_error is not None and found.timesteps is not None:
            errors = [_round(max(float(error), SMALLEST_ERROR)) for error in found.temporal_error]
            curves.append(about | {"step": [int(step) for step in found.timesteps], "error": errors})
    return {"cells": cells, "curves": curves, "engines": [row for found in latency for row in _engines(found)]}


def drawable(records: Sequence[Record], metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    """The metrics that the charts offer: with a better side, and above zero everywhere, since axes are logarithmic."""
    shown = [record for record in records if record.method != FULL_PRECISION and record.metrics]
    found = {}
    for name, metric in metrics.items():
        lows = [record.metrics[name].low for record in shown if name in record.metrics]
        if lows and min(lows) > 0 and metric.better is not None:
            found[name] = metric
    return found


def charts(
    titles: Mapping[str, str],
    metrics: Mapping[str, Metric],
    precisions: Sequence[str],
    engines: Sequence[Mapping],
    kinds: Sequence[str],
    lines: Sequence[str] = (),
) -> dict[str, Spec]:
    """The charts by name: ``size``, ``time``, ``latency`` and ``temporal``.

    ``titles`` are those of ``metrics``, which can be chosen, and ``precisions`` those of quantised rows, from many bits
    to few. ``engines`` are those of `datasets`, all tasks together, and so ``kinds`` of its cells. ``lines`` are the
    rows whose lines over steps are shown at first, or all where there are none.
    """
    higher = [name for name, metric in metrics.items() if metric.better == "higher"]
    size = {"field": "size", "title": "Network (MiB)", "scale": {"zero": False, "nice": True}}
    time = {
        "field": "seconds",
        "title": "Quantisation time (seconds)",
        "scale": {"type": "log", "nice": False, "padding": 12},
    }
    return {
        "size": _scatter("against size", size, [], titles, higher, precisions, kinds),
        "time": _scatter("against time", time, ["precision"], titles, higher, precisions, kinds),
        "latency": _latency(precisions, engines),
        "temporal": _temporal(lines),
    }


def _scatter(
    text: str,
    cost: Spec,
    front_of: Sequence[str],
    titles: Mapping[str, str],
    higher: Sequence[str],
    precisions: Sequence[str],
    kinds: Sequence[str],
) -> Spec:
    """A metric against a cost: a point a row, and a line through the rows that no other one beats in both."""
    x: Spec = {"type": "quantitative", "axis": {"format": "~g", "tickCount": 6, "labelFlush": False}, **cost}
    y = {
        "axis": {"format": "~g", "tickCount": 6},
        "scale": {"type": "log", "nice": False, "padding": 12},
        "title": None,
    }
    colour = _precision_colour(precisions)
    chosen = {"test": f"method === '{NO_METHOD}' || datum.method === method", "value": 0.95}
    known = {"filter": "isValid(datum.value)"}
    front = [
        known,
        {
            "window": [{"op": "min", "field": "loss", "as": "least"}],
            "frame": [None, 0],
            "groupby": list(front_of),
            "sort": [{"field": cost["field"]}, {"field": "loss"}],
        },
        {"filter": "datum.loss <= datum.least"},
    ]
    return {
        "title": {"text": {"expr": f"titles[metric] + ' {text}'"}},
        "description": f"Scatter chart of the chosen metric {text}, a point for each row.",
        "data": {"name": "cells"},
        "width": "container",
        "height": 320,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "params": [
            {"name": "titles", "value": dict(titles)},
            _bound("task"),
            _bound("metric"),
            _bound("method"),
        ],
        "transform": [
            {"filter": "datum.task === task"},
            {"calculate": "datum[metric]", "as": "value"},
            {"calculate": "datum[metric + '_low']", "as": "low"},
            {"calculate": "datum[metric + '_high']", "as": "high"},
            {"joinaggregate": [{"op": "valid", "field": "value", "as": "known"}]},
            {"calculate": f"indexof({list(higher)}, metric) < 0 ? datum.value : -datum.value", "as": "loss"},
        ],
        "encoding": {"x": x},
        "layer": [
            {
                "mark": {
                    "type": "line",
                    "interpolate": "step-after",
                    "strokeWidth": 1.5,
                    "opacity": 0.6,
                    "aria": False,
                },
                "transform": front,
                "encoding": {
                    "y": {"field": "value", "type": "quantitative", **y},
                    **({"color": colour} if front_of else {"color": {"value": "currentColor"}}),
                },
            },
            {
                "mark": {"type": "rule", "aria": False},
                "transform": [known],
                "encoding": {
                    "y": {"field": "low", "type": "quantitative", **y},
                    "y2": {"field": "high"},
                    "color": colour,
                    "opacity": {"condition": chosen | {"value": 0.6}, "value": 0.1},
                },
            },
            {
                "mark": {"type": "point", "filled": True, "size": 80},
                "transform": [known],
                "encoding": {
                    "y": {"field": "value", "type": "quantitative", **y},
                    "color": colour,
                    "shape": {
                        "field": "kind",
                        "type": "nominal",
                        "scale": {"domain": list(kinds)},  # a legend without entries has no size that can be drawn
                        "legend": _legend(1) | SHAPES,
                    },
                    "opacity": {"condition": chosen, "value": 0.2},
                    "href": {"field": "href"},
                    "tooltip": [
                        {"field": "row", "title": "Row"},
                        {"field": "precision", "title": "Precision"},
                        {"field": "value", "title": "Value", "type": "quantitative", "format": ".4~g"},
                        {"field": "low", "title": "95 % from", "type": "quantitative", "format": ".4~g"},
                        {"field": "high", "title": "to", "type": "quantitative", "format": ".4~g"},
                        {"field": "size", "title": "MiB", "type": "quantitative", "format": ".4~g"},
                        {"field": "seconds", "title": "Seconds", "type": "quantitative", "format": ".4~g"},
                    ],
                },
            },
            {
                "mark": {"type": "text", "dx": 8, "dy": -8, "align": "left", "aria": False},
                "transform": [known, {"filter": "datum.method === method"}],
                "encoding": {
                    "y": {"field": "value", "type": "quantitative", **y},
                    "text": {"field": "precision"},
                },
            },
            {  # where no row has the metric it says so, and gives the logarithmic axis a domain
                "mark": {"type": "text", "fontSize": 13},
                "transform": [
                    {"filter": "datum.known === 0"},
                    {"aggregate": [{"op": "mean", "field": cost["field"], "as": cost["field"]}]},
                    {"calculate": "1", "as": "value"},
                ],
                "encoding": {
                    "y": {"field": "value", "type": "quantitative", **y},
                    "text": {"value": "not measured on this task"},
                },
            },
        ],
        "config": CONFIG,
    }


def _latency(precisions: Sequence[str], engines: Sequence[Mapping]) -> Spec:
    """Feature distance against the time of one evaluation, a point an engine."""
    ends = {"axis": {"format": "~g", "tickCount": 6}}
    x = {"type": "quantitative", "title": "Time of one evaluation (milliseconds)", "scale": {"zero": True}, **ends}
    y = {"type": "quantitative", "title": None, "scale": {"zero": True}, **ends}
    order = [*precisions, *(row["precision"] for row in engines)].index  # full precision is the last
    # All engines and precisions of the page: on a task without any, a legend of none has no size that can be drawn.
    scale = {"scheme": "tableau10", "domain": list(dict.fromkeys(row["engine"] for row in engines))}
    colour = {"field": "engine", "type": "nominal", "scale": scale, "legend": _legend(1)}
    point = {"x": {"field": "milliseconds", **x}, "y": {"field": "distance", **y}, "color": colour}
    return {
        "title": "Feature distance against latency",
        "description": "Scatter chart of feature distance against the time of one evaluation, a point for each engine.",
        "data": {"name": "engines"},
        "width": "container",
        "height": 320,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "params": [_bound("task")],
        "transform": [{"filter": "datum.task === task"}],
        "layer": [
            {
                "mark": {"type": "rule", "aria": False, "opacity": 0.6},
                "encoding": point | {"y": {"field": "low", **y}, "y2": {"field": "high"}},
            },
            {
                "mark": {"type": "point", "filled": True, "size": 90, "opacity": 0.95},
                "encoding": point
                | {
                    "shape": {
                        "field": "precision",
                        "type": "nominal",
                        "scale": {"domain": sorted({row["precision"] for row in engines}, key=order)},
                        "legend": ABOVE | SHAPES,
                    },
                    "tooltip": [
                        {"field": "engine", "title": "Engine"},
                        {"field": "precision", "title": "Precision"},
                        {"field": "milliseconds", "title": "Milliseconds", "type": "quantitative", "format": ".4~g"},
                        {"field": "distance", "title": "Feature distance", "type": "quantitative", "format": ".4~f"},
                        {"field": "size", "title": "MiB", "type": "quantitative", "format": ".4~g"},
                    ],
                },
            },
        ],
        "config": CONFIG,
    }


def _temporal(lines: Sequence[str]) -> Spec:
    """Error of the temporal features over the denoising steps, a line a row, which the legend shows and hides."""
    chosen = f"method === '{NO_METHOD}' || datum.method === method"
    colour = {
        "field": "row",
        "type": "nominal",
        "sort": list(lines) or "ascending",  # what is shown at first has colours of its own
        "scale": {"scheme": "tableau20"},
        "legend": _legend(1) | {"symbolType": "stroke"},
    }
    dash = {
        "field": "kind",
        "type": "nominal",
        "legend": ABOVE | SHAPES | {"symbolType": "stroke", "symbolSize": 400},
    }
    # The legend has all rows, whichever are shown: those of marks that nothing is seen of. They come last, since the
    # legend follows the clicks of the first layer alone.
    names = {"mark": {"type": "point", "size": 0, "aria": False}, "encoding": {"color": colour, "strokeDash": dash}}
    shown = {
        "name": "shown",
        "select": {"type": "point", "fields": ["row"], "toggle": "true"},
        "bind": "legend",
        "value": [{"row": row} for row in lines],
    }
    drawn = {
        "params": [shown],
        "transform": [{"filter": {"param": "shown"}}, {"flatten": ["step", "error"]}],
        "mark": {"type": "line", "point": {"size": 24}},
        "encoding": {
            "x": {
                "field": "step",
                "type": "quantitative",
                "title": "Time step (noise to image)",
                "scale": {"reverse": True, "nice": False, "padding": 6},
            },
            "y": {
                "field": "error",
                "type": "quantitative",
                "title": "1 - cosine to full precision",
                "scale": {"type": "log", "nice": False, "padding": 6},
                "axis": {"format": "~e", "tickCount": 6},
            },
            "color": colour,
            "strokeDash": dash,
            "opacity": {"condition": {"test": chosen, "value": 1}, "value": 0.12},
            "strokeWidth": {"condition": {"test": "datum.method === method", "value": 4}, "value": 1.5},
            "href": {"field": "href"},
            "tooltip": [
                {"field": "row", "title": "Row"},
                {"field": "step", "title": "Time step", "type": "quantitative"},
                {"field": "error", "title": "1 - cosine", "type": "quantitative", "format": ".3~g"},
            ],
        },
    }
    return {
        "title": {"text": {"expr": "'Temporal features over steps, ' + precision"}},
        "description": "Line chart of the error of the temporal features at each time step, a line for each row.",
        "data": {"name": "curves"},
        "width": "container",
        "height": 380,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "params": [_bound("task"), _bound("precision"), _bound("method")],
        "transform": [{"filter": "datum.task === task && datum.precision === precision"}],
        "layer": [drawn, names],
        "config": CONFIG,
    }


def _bound(name: str) -> Spec:
    """A signal that is the value of the control ``chart-<name>``; the page sets the first value."""
    return {"name": name, "value": "", "bind": {"element": f"#chart-{name}", "event": "change"}}


def _precision_colour(precisions: Sequence[str]) -> Spec:
    colours = [COLOURS.get(precision, OTHER_COLOUR) for precision in precisions]
    scale = {"domain": list(precisions), "range": colours}
    return {"field": "precision", "type": "nominal", "scale": scale, "legend": _legend(2)}


def _legend(columns: int) -> Spec:
    """A legend that fits a telephone. Its columns do not depend on the width: Vega sets the height once."""
    return {"title": None, "columns": columns, "labelLimit": 270, "symbolLimit": 0}


def _kind(record: Record) -> str:
    """What differs from the shared protocol and from simulated arithmetic, in the words of the records."""
    told = [record.protocol] * (record.protocol != SHARED) + [record.backend] * (record.backend != SIMULATED)
    return ", ".join(told) or f"{SHARED}, {SIMULATED}"


def _engines(found: Mapping) -> list[Spec]:
    return [
        {
            "task": found["task"],
            "engine": row["label"],
            "precision": row["precision"],
            "milliseconds": _round(1000 * row["seconds"]["value"]),
            "size": _round(row["size_mib"]),
            "distance": _round(row[QUALITY]["value"]),
            "low": _round(row[QUALITY]["low"]),
            "high": _round(row[QUALITY]["high"]),
        }
        for row in found["rows"]
        if row.get(QUALITY)
    ]


def _round(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
