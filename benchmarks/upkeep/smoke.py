"""The suite cut down to minutes: every stage, task and method of each table, with numbers that mean nothing.

`python -m benchmarks.upkeep.smoke params < params.yaml` prints the cut-down settings. With these, in the current
folder, `targets` prints the DVC stages to run: one row of each table, and so what comes before it. `rest` runs others
in one process, since a row's own would take longer to start than to run: each method on one task, the next one on the
next task. It also executes and times a network, and runs the study and the analysis of temporal features. `check`
fails unless their records and the tables are there. `nox -s bench-smoke` uses all four. What this machine cannot
execute in integers is left out, which `targets` and `rest` say.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import os
import sys
from collections.abc import Container, Mapping
from pathlib import Path

import yaml

from benchmarks.runtime.devices import device_of
from benchmarks.suite import discover, params
from benchmarks.suite.record import FULL_PRECISION, Cell, Record

PRECISION = "w4a8"
ITERATIONS = 2
TASK_LIMITS = {"steps": 4, "images": 12, "batch": 4, "calibration_images": 4, "reference_images": 16, "data_images": 64}
PAGES = (
    "results/README.md",
    "results/METHODS.md",
    "results/COVERAGE.md",
    "results/FINDINGS.md",
    "results/RANKING.md",
    "results/cells.csv",
)
# Of what is executed and timed.
DEPLOYMENT = {"images": 4, "batch": 4, "rounds": 1, "evaluations": 1}
TEMPORAL = {"precisions": [PRECISION], "images": 4}
STUDY = {"precisions": [PRECISION], "seeds": 1, "images": 4}
DEPLOYMENT_PAGE, STUDY_PAGE, TEMPORAL_PAGE = "results/DEPLOYMENT.md", "results/STUDY.md", "results/TEMPORAL.md"


def cut(document: dict[str, object]) -> dict[str, object]:
    """A parsed `params.yaml` with all tasks and rows, one precision and seed, few images, steps and iterations.

    Iterations are all settings of a method whose name ends in ``iterations``.
    """
    small = copy.deepcopy(document)
    small["name"] = "smoke"
    small["gates"] = {}
    small.pop("rounds", None)  # of more images than there are
    for table in small["tables"].values():
        table |= {"precisions": [PRECISION], "seeds": {}}
    if "deployment" in small:
        small["deployment"] |= {"tasks": small["deployment"]["tasks"][:1], **DEPLOYMENT}
    if "temporal" in small:
        small["temporal"] |= {"tasks": small["temporal"]["tasks"][:1], **TEMPORAL}
    if "study" in small:
        small["study"] |= {"tasks": small["study"]["tasks"][:1], **STUDY}
        for curve in small["study"]["curves"].values():
            curve["settings"] = _short(curve["method"], curve.get("settings", {}))
            curve["points"] = [_fewer(settings) for settings in curve.get("points", [])[:1]]
            curve |= {"tasks": [], "precisions": []}
    for task in small["tasks"].values():
        for key, limit in TASK_LIMITS.items():
            if task.get(key) != 0:
                task[key] = min(task.get(key) or limit, limit)
    for by_task in small.get("overrides", {}).values():
        for settings in by_task.values():
            settings |= _fewer(settings)
    small["methods"] = {name: _short(name, settings) for name, settings in small["methods"].items()}
    return small


def _short(method: str, settings: dict[str, object]) -> dict[str, object]:
    """Settings of a method with few iterations, also where it has them by default."""
    config = discover.method(method).config(**settings)
    names = [field.name for field in dataclasses.fields(config) if field.name.endswith("iterations")]
    return settings | {name: min(getattr(config, name), ITERATIONS) for name in names}


def _fewer(settings: dict[str, object]) -> dict[str, object]:
    return {key: min(value, ITERATIONS) if key.endswith("iterations") else value for key, value in settings.items()}


def left_out(suite: params.Suite, device: str) -> dict[str, str]:
    """Why this machine cannot sample the cells of some tables, by table: it does not have their backend."""
    found = {}
    for name, table in suite.tables.items():
        try:
            discover.backend(table.backend).check(device_of(device))
        except ValueError as error:
            found[name] = str(error)
    return found


def chosen(suite: params.Suite, without: Container[str] = ()) -> list[Cell]:
    """The cells to run: full precision of each task and, of each table, every method once, on its tasks in turn.

    ``without`` are tables that are left out.
    """
    cells = [cell for cell in suite.cells() if cell.method == FULL_PRECISION]
    for name, table in suite.tables.items():
        if name in without:
            continue
        turns = {method: table.tasks[index % len(table.tasks)] for index, method in enumerate(table.methods)}
        cells += [cell for cell in suite.measured(name) if cell.task == turns[cell.method]]
    return cells


def targets(suite: params.Suite, without: Container[str] = ()) -> list[str]:
    """Names of the DVC stages to run before `rest`: one row of each table. DVC adds all that these need."""
    tables = {name: table for name, table in suite.tables.items() if name not in without}
    return [f"score_{name}@{table.tasks[0]}-{table.methods[0]}" for name, table in tables.items()]


def run_rest(suite: params.Suite, device: str) -> None:
    """Run the chosen cells that have no record yet, and what comes before.

    Raises an ExceptionGroup of what fails.
    """
    from benchmarks.latency.engines import engines
    from benchmarks.runtime import files, workers
    from benchmarks.stages import calibrate, generate, latency, reference, score, study, tables, temporal

    shards = workers.default_shards(device_of(device))
    rest = [cell for cell in chosen(suite, left_out(suite, device)) if not files.record_file(cell).is_file()]
    full = [cell for cell in rest if cell.method == FULL_PRECISION]
    for stage in (calibrate, reference):
        for cell in full:
            stage.run(suite, cell.task, device, shards)
    for cells in (full, [cell for cell in rest if cell not in full]):
        for stage in (generate, score):
            stage.run(suite, cells, device, shards)
    if suite.deployment is not None:
        every = engines(list(suite.deployment.precisions))
        missing = {engine.name: engine.objection for engine in every if engine.objection}
        _say(missing)
        latency.run(suite, suite.deployment.tasks[0], list(missing))
    if suite.study is not None:
        study.run(suite, suite.study.tasks[0])
    if suite.temporal is not None:
        temporal.run(suite, suite.temporal.tasks[0])
    if suite.many_images is not None:
        # That many take half an hour: tables are made without, of the folder that DVC knows.
        tables.MANY_IMAGES.mkdir(parents=True, exist_ok=True)


def problems(root: Path, device: str = "cpu") -> list[str]:
    """What is missing or wrong, a line each, after a run of the suite in ``root``: records, pages, failed cells."""
    suite = params.load(root / "params.yaml")
    extra = {DEPLOYMENT_PAGE: suite.deployment, STUDY_PAGE: suite.study, TEMPORAL_PAGE: suite.temporal}
    pages = [*PAGES, *(page for page, asked in extra.items() if asked is not None)]
    found = [f"{path} is missing" for path in pages if not (root / path).is_file()]
    for cell in chosen(suite, left_out(suite, device)):
        path = root / "results" / "records" / f"{cell.name}.json"
        if not path.is_file():
            found.append(f"{path.relative_to(root)} is missing")
            continue
        record = Record.load(path)
        if record.cell != cell:
            found.append(f"{path.relative_to(root)} is of {record.cell.name}")
        if record.status == "failed":
            found.append(f"{cell.name} failed: {record.reason}")
    return found


def _say(missing: Mapping[str, str]) -> None:
    """Name on stderr what is left out, and why."""
    for name, reason in missing.items():
        print(f"left out: {name}, since {reason}", file=sys.stderr)


def main() -> None:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.upkeep.smoke", description=__doc__)
    parser.add_argument("action", choices=("params", "targets", "rest", "check"), help="see above")
    action = parser.parse_args().action
    device = os.environ.get("TFMQ_BENCH_DEVICE", "auto")
    if action == "params":
        print(yaml.safe_dump(cut(yaml.safe_load(sys.stdin)), sort_keys=False), end="")
    elif action == "targets":
        suite = params.load(Path("params.yaml"))
        without = left_out(suite, device)
        _say({f"table {name}": reason for name, reason in without.items()})
        print("\n".join(targets(suite, without)))
    elif action == "rest":
        run_rest(params.load(Path("params.yaml")), device)
    else:
        found = problems(Path(), device)
        print("\n".join(found) or "all records and tables are there")
        sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
