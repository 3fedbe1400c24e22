"""The suite cut down to minutes: every stage, task and method once, with numbers that mean nothing.

`python -m benchmarks.smoke params < params.yaml` prints the cut-down settings, `python -m benchmarks.smoke check` fails
unless the records and tables of the suite in the current folder are there. `nox -s bench-smoke` uses both.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import sys
from pathlib import Path

import yaml

from benchmarks import discover, params
from benchmarks.record import Record

PRECISION = "w4a8"
ITERATIONS = 2
TASK_LIMITS = {"steps": 4, "images": 12, "batch": 4, "calibration_images": 4, "reference_images": 16, "data_images": 64}
TABLES = ("results/README.md", "results/leaderboard.csv")


def cut(document: dict[str, object]) -> dict[str, object]:
    """A parsed `params.yaml` with all tasks and methods, one precision and seed, few images, steps and iterations.

    Iterations are all settings of a method whose name ends in ``iterations``.
    """
    small = copy.deepcopy(document)
    small["name"] = "smoke"
    small["gates"] = {}
    small["precisions"] = [PRECISION]
    small["seeds"] = small["seeds"][:1]
    for task in small["tasks"].values():
        for key, limit in TASK_LIMITS.items():
            task[key] = min(task.get(key) or limit, limit)
    for name, settings in small["methods"].items():
        for field in dataclasses.fields(discover.method(name).config):
            if field.name.endswith("iterations"):
                settings[field.name] = ITERATIONS
    return small


def problems(root: Path) -> list[str]:
    """What is missing or wrong, a line each, after a run of the suite in ``root``: records, tables, failed cells."""
    found = [f"{path} is missing" for path in TABLES if not (root / path).is_file()]
    for cell in params.load(root / "params.yaml").cells():
        path = root / "results" / "records" / f"{cell.name}.json"
        if not path.is_file():
            found.append(f"{path.relative_to(root)} is missing")
            continue
        record = Record.from_json(path.read_text(encoding="utf-8"))
        if record.cell != cell:
            found.append(f"{path.relative_to(root)} is of {record.cell.name}")
        if record.status == "failed":
            found.append(f"{cell.name} failed: {record.reason}")
    return found


def main() -> None:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smoke", description=__doc__)
    parser.add_argument("action", choices=("params", "check"), help="print cut-down settings, or check a finished run")
    if parser.parse_args().action == "params":
        print(yaml.safe_dump(cut(yaml.safe_load(sys.stdin)), sort_keys=False), end="")
        return
    found = problems(Path())
    print("\n".join(found) or "all records and tables are there")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
