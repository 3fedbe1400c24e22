"""tables: all records become tables, pages, CSV, figures and one page to look at, and the summary in the top README."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

import baselines
from benchmarks.metrics import Metric, metrics
from benchmarks.report import (
    figures,
    findings,
    pages,
    ranking,
    ranking_page,
    recommended,
    rounds,
    series,
    site,
    tables,
    temporal,
)
from benchmarks.report.judge import Judge, judges_of
from benchmarks.report.statistic import CANDIDATES, RANKED_BY
from benchmarks.runtime import excerpt, files
from benchmarks.stages import _drawn
from benchmarks.stages._setup import prompts_of
from benchmarks.suite.params import Suite
from benchmarks.suite.record import FULL_PRECISION, Cell, Record, Value
from benchmarks.suite.tasks import Task

README = Path("README.md")
REPORTED = Path(baselines.__file__).with_name("reported.csv")
LATENCY = files.RESULTS / "latency"
LEADERBOARD = series.LEADERBOARD
MANY_IMAGES = files.RESULTS / "many_images"

Draw = Callable[[str, str, figures.Figure], None]


def run(suite: Suite) -> str:
    """Write everything that is generated from records; returns what the suite's README shows.

    That is the comparison with the papers' numbers where the suite has one, else the best methods over the tasks of the
    first table, or all of that table where it has one task.

    A cell without a record is shown as failed. A suite with papers' numbers is one that people run in parts: there such
    a cell is not measured beside the papers' number, unless `rounds --full` has drawn all its images, and in no other
    table. Claims that rounds have decided are among the findings. Raises ValueError if no cell has a record,
    unless there are papers' numbers to show.
    """
    in_full = {} if suite.reported is None else _drawn.in_full(suite)
    in_full = {cell: record for cell, record in in_full.items() if not files.record_file(cell).is_file()}
    read = [in_full.get(cell) or _read(suite, cell) for cell in suite.cells()]
    if suite.reported is None and all(record.status == "failed" for record in read):
        raise ValueError("there are no records in results/records: run `dvc repro`")
    known = metrics()
    reported = pd.read_csv(REPORTED, dtype=str, keep_default_na=False)
    numbers = [] if suite.reported is None else tables.numbers_of(reported)
    gates = tables.reported_gates(read, suite, numbers)
    gates = {task: gates.get(task, {}) | suite.gates.get(task, {}) for task in suite.tasks}
    records = {record.cell: record for record in tables.gated(read, gates)}
    in_full = {cell: records[cell] for cell in in_full}
    if suite.reported is not None:
        records = {cell: record for cell, record in records.items() if files.record_file(cell).is_file()}
    excerpts = {cell: excerpt.read(cell) for cell, record in records.items() if record.metrics}
    images = {cell: found.values for cell, found in excerpts.items()}
    judges = judges_of(list(records.values()), images, known)
    full = [record for cell, record in records.items() if cell.method == FULL_PRECISION]
    measured = {name: [records[cell] for cell in suite.measured(name) if cell in records] for name in suite.tables}
    shown = {
        name: [
            *(record for record in full if record.task in table.tasks),
            *(records[cell] for cell in suite.beside(name) if cell in records),
            *measured[name],
        ]
        for name, table in suite.tables.items()
        if measured[name]
    }
    if suite.reported is None:
        first = next(iter(shown))
        summary, comparison = tables.leaders(shown[first], judges), ""
        front = summary or tables.section(first, shown[first], known, images, judges)
    else:
        summary = ""
        front = comparison = tables.paper([*records.values(), *in_full.values()], suite, numbers)
    drawn = _figures(suite, shown, known, judges)
    files.write_text(files.RESULTS / "METHODS.md", pages.methods(suite, reported))
    files.write_text(files.RESULTS / "COVERAGE.md", pages.coverage(list(records.values())))
    files.write_text(
        files.RESULTS / "README.md", tables.report(shown, known, drawn, images, judges, summary, comparison)
    )
    steps = {cell: each.temporal_error for cell, each in excerpts.items() if each.temporal_error is not None}
    decided = _decided(suite, known)
    found = findings.page(
        list(records.values()),
        judges,
        known,
        steps=steps,
        small=suite.reported is None,
        drawn=decided,
        margin=suite.equal_within,
        compared=_compared(suite),
    )
    files.write_text(files.RESULTS / "FINDINGS.md", found)
    files.write_text(files.RESULTS / "RANKING.md", _ranking(list(records.values()), images, known))
    if suite.temporal is not None:
        temporal.write(files.RESULTS / "temporal", files.RESULTS / "figures", files.RESULTS / "TEMPORAL.md")
    if suite.reported is None:
        _write_series(suite, measured)
    files.write_text(files.RESULTS / "cells.csv", tables.csv(tables.frame({"": full, **measured}, known, judges)))
    if suite.reported is None:
        shown_prompts = {name: _prompts(task, excerpt.SHOWN) for name, task in suite.tasks.items() if task.prompts}
        latency = [files.read_json(path) for path in sorted(LATENCY.glob("*.json"))]
        levels = tables.levels(list(records.values()), judges)
        lines = suite.measured(LEADERBOARD) if LEADERBOARD in suite.tables else ()
        look = site.page(list(records.values()), excerpts, known, levels, shown_prompts, latency, lines)
        files.write_text(files.RESULTS / "site" / "index.html", look)
    files.write_text(README, tables.replace_region(README.read_text(encoding="utf-8"), front))
    return front


def _compared(suite: Suite) -> list[str]:
    """The rows beside which the recommended recipe stands: those of methods of the leaderboard and of newer ones."""
    rows = [
        method for name in ("leaderboard", "newer") if name in suite.tables for method in suite.tables[name].methods
    ]
    return [row for row in rows if row != recommended.RECOMMENDED]


def _decided(suite: Suite, known: Mapping[str, Metric]) -> dict[str, list[findings.Drawn]]:
    """What rounds have decided of each task that has any."""
    found = {}
    for task in suite.rounds.images if suite.rounds else ():
        records, values = _drawn.in_rounds(suite, task)
        decision = rounds.decide(suite, task, list(records.values()), values, known)
        found[task] = rounds.decided(decision)
    return found


def _write_series(suite: Suite, measured: Mapping[str, Sequence[Record]]) -> None:
    """Write what `dvc metrics` and `dvc plots` show."""
    rows = series.metrics(suite, measured)
    with files.new_folder(files.RESULTS / "metrics") as folder:
        for name, row in rows.items():
            files.write_json(folder / f"{name}.json", row)
    texts = series.bars(rows)
    shown = [r for r in measured.get(LEADERBOARD, []) if r.seed == 0 and r.precision == series.PRECISION and r.metrics]
    for task in dict.fromkeys(record.task for record in shown):
        read = {record.method: excerpt.read(record.cell) for record in shown if record.task == task}
        curves = {name: each.temporal_error for name, each in read.items()}
        texts |= series.errors(task, next(iter(read.values())).timesteps, curves)
    if LEADERBOARD in suite.tables:
        for path in sorted((files.RESULTS / "temporal").glob("*.json")):
            texts |= series.deviations(files.read_json(path), suite.tables[LEADERBOARD].methods)
    with files.new_folder(files.RESULTS / "plots") as folder:
        for name, text in texts.items():
            files.write_text(folder / name, text)


def _read(suite: Suite, cell: Cell) -> Record:
    path = files.record_file(cell)
    reason = "no record; run `dvc repro`"
    if path.is_file():
        record = Record.load(path)
        if not record.metrics or _is_of(record):
            return record
        reason = "what pages show beside its record is missing or of other images; run `dvc repro`"
    task = suite.tasks[cell.task]
    return Record(
        task=task.name,
        task_version=task.version,
        method=cell.method,
        precision=cell.precision,
        seed=cell.seed,
        protocol=cell.protocol,
        backend=cell.backend,
        settings={"task": task.described(), "method": {}},
        status="failed",
        reason=reason,
        metrics={},
        cost=None,
        coverage={},
        details={},
        inputs={},
        environment={},
    )


def _is_of(record: Record) -> bool:
    """Whether the excerpt beside a record is of the images that were scored."""
    try:
        return excerpt.read(record.cell).scored == record.inputs["images"]
    except ValueError:
        return False


def _ranking(records: list[Record], images: dict[Cell, dict[str, np.ndarray]], known: dict[str, Metric]) -> str:
    """Write the figures of the page on ranking; returns the page."""
    evidence = ranking.Evidence(records, images, known)
    outcomes = {candidate.name: ranking.outcome(candidate, evidence) for candidate in CANDIDATES}
    drawn = []
    for name, text, figure in ranking_page.figures_of(evidence, outcomes):
        files.write_bytes(files.RESULTS / "figures" / f"{name}.png", figures.png(figure))
        drawn.append((text, f"figures/{name}.png"))
    many = [files.read_json(path) for path in sorted(MANY_IMAGES.glob("*.json"))]
    return ranking_page.page(evidence, outcomes, drawn, many=many)


def _figures(
    suite: Suite, shown: dict[str, list[Record]], known: dict[str, Metric], judges: dict[str, Judge]
) -> list[tuple[str, str]]:
    """Write the figures, of seed 0; returns a caption and the path from the results page of each."""
    drawn = []

    def draw(name: str, text: str, figure: figures.Figure) -> None:
        files.write_bytes(files.RESULTS / "figures" / f"{name}.png", figures.png(figure))
        drawn.append((text, f"figures/{name}.png"))

    shown = {name: [record for record in records if record.seed == 0] for name, records in shown.items()}
    ranks = {
        precision: {tables.label(method): value for method, value in row.items()}
        for precision, row in tables.mean_ranks(shown.get(LEADERBOARD, []), judges).items()
    }
    if ranks:
        text = f"Mean rank over tasks by {RANKED_BY.label.lower()}, 1 is best, with 95 % intervals"
        draw("across-tasks", text, figures.intervals(ranks, "all tasks", "Mean rank"))
    every = list({record.cell: record for records in shown.values() for record in records}.values())
    for task in dict.fromkeys(record.task for record in every):
        values: dict[str, dict[str, Value]] = {}
        for record in every:
            if record.task == task and record.cell.row == record.method and tables.QUALITY in record.metrics:
                panel = values.setdefault(record.precision, {})
                panel[tables.label(record.method)] = record.metrics[tables.QUALITY]
        if values:
            metric = known[tables.QUALITY].label
            text = f"{task}: {metric.lower()} to the full-precision image of the same noise, with 95 % intervals"
            draw(f"{task}-intervals", text, figures.intervals(values, task, metric))
        for table, records in shown.items():
            of_task = [record for record in records if record.task == task]
            full = [record for record in of_task if record.method == FULL_PRECISION and record.metrics]
            for precision in dict.fromkeys(r.precision for r in of_task if r.method != FULL_PRECISION):
                rows = [record for record in of_task if record.precision == precision and record.metrics]
                if rows and full:
                    name, text = f"{task}-{table}-{precision}", f"{task}, {table}, {precision}"
                    _draw_grid(draw, suite.tasks[task], name, text, [*full, *rows])
                    curves, timesteps = _curves(rows)
                    errors = figures.temporal_error(curves, timesteps, text)
                    draw(f"{name}-temporal", f"{text}: error of the temporal features over steps", errors)
    for record in every:
        if "cached" in record.details:
            cached, names = np.array(record.details["cached"]), record.details["projections"]
            name = record.cell.name.replace("/", "-")
            title = f"{tables.row_label(record)}, {record.precision}"
            text = f"{record.task}, {title}: cached and computed temporal features"
            draw(f"{name}-selection", text, figures.selection(cached, names, record.details["timesteps"], title))
    return drawn


def _draw_grid(draw: Draw, task: Task, name: str, text: str, records: Sequence[Record]) -> None:
    """The first images of some rows, under their prompts where the task has any."""
    grid = {tables.row_label(record): excerpt.read(record.cell).images for record in records}
    columns = min(len(images) for images in grid.values())
    prompts = _prompts(task, columns)
    same = "noise and prompt" if prompts else "noise"
    draw(f"{name}-samples", f"{text}: the same {same} in each column", figures.sample_grid(grid, columns, prompts))


def _prompts(task: Task, count: int) -> list[str]:
    """The prompts of the first images of a task; none where it has no prompts."""
    return [] if task.prompts is None else prompts_of(task, "sample", range(count))


def _curves(records: Sequence[Record]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Temporal error at each step by row, and the time steps."""
    read = {tables.row_label(record): excerpt.read(record.cell) for record in records}
    return {name: each.temporal_error for name, each in read.items()}, next(iter(read.values())).timesteps
