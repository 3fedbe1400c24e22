"""Does the ranking, which is made from few images, agree with image metrics of many?

`python -m benchmarks.upkeep.many_images --task emoji-ldm8` makes the leaderboard's cells of a task anew, as
`many_images` of params.yaml says, with many images instead of the task's, and writes all their metrics to
`results/many_images/TASK.json`; `python -m benchmarks tables` puts them beside the ranking in `results/RANKING.md`. It
works in a folder inside .resume/; all else stays as it is, and a run that was stopped goes on there with the same code.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from benchmarks.runtime import environment, files, workers
from benchmarks.runtime.devices import device_of
from benchmarks.stages import calibrate, generate, reference, score
from benchmarks.stages._setup import cells_of, task_of
from benchmarks.stages.tables import LEADERBOARD, MANY_IMAGES
from benchmarks.suite import params
from benchmarks.suite.record import FULL_PRECISION, Record
from benchmarks.upkeep import DEVICE_VARIABLE
from benchmarks.upkeep.scratch import open_scratch

if TYPE_CHECKING:
    from benchmarks.suite.params import Suite
    from benchmarks.suite.tasks import Task


def task_with_many(suite: Suite, name: str) -> Task:
    """The task with as many images as ``many_images`` says. Raises ValueError for one that does not stand there."""
    wanted = suite.many_images
    if wanted is None or name not in wanted.tasks:
        known = ", ".join(wanted.tasks) if wanted else "none"
        raise ValueError(f"{name} is none of the tasks under `many_images` of params.yaml, which are {known}")
    return dataclasses.replace(task_of(suite, name), images=wanted.images)


def run(suite: Suite, task: Task, precision: str, device_name: str, shards: int) -> dict[str, object]:
    """Make the leaderboard's cells of a task at a precision in the current folder; returns what is kept of them.

    Raises ValueError for a task or precision that the leaderboard does not have.
    """
    suite = dataclasses.replace(suite, tasks=suite.tasks | {task.name: task})
    full = cells_of(suite, None, task.name, FULL_PRECISION)
    methods = suite.tables[LEADERBOARD].methods
    cells = [each for name in methods for each in cells_of(suite, LEADERBOARD, task.name, name, [precision], 0)]
    if not files.calibration(task.name).is_dir():
        calibrate.run(suite, task.name, device_name, shards)
    if not files.reference(task.name).is_dir():
        reference.run(suite, task.name, device_name, shards)
    for cell in tqdm([*full, *cells], desc=f"{task.name}: cells of {task.images} images", unit="cell"):
        if not files.record_file(cell).is_file():
            generate.run(suite, [cell], device_name, shards)
            score.run(suite, [cell], device_name, shards)
    records = [Record.from_json(files.record_file(cell).read_text(encoding="utf-8")) for cell in cells]
    rows = {
        record.method: {
            "settings": record.settings["method"],
            "metrics": {name: value.value for name, value in record.metrics.items()},
        }
        for record in records
        if record.status == "measured"
    }
    described = {"task": task.name, "task_version": task.version, "precision": precision, "images": task.images}
    return described | {"environment": environment.describe(), "rows": rows}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.upkeep.many_images", description=__doc__)
    parser.add_argument("--task", required=True, help="a task under `many_images` of params.yaml")
    parser.add_argument(
        "--device",
        default=os.environ.get(DEVICE_VARIABLE, "auto"),
        choices=("auto", "cpu", "cuda"),
        help=f"where to compute (default: the variable {DEVICE_VARIABLE})",
    )
    parser.add_argument("--shards", type=int, metavar="N", help="processes (default: one a core, or one a GPU)")
    options = parser.parse_args(arguments)
    root, code = Path.cwd(), 1
    try:
        suite = params.load(Path("params.yaml"))
        params.check_methods(suite)
        device = device_of(options.device)
        task = task_with_many(suite, options.task)
        folder, lock = open_scratch(root, device, f"many_images-{options.task}")
        os.chdir(folder)
        shards = options.shards or workers.default_shards(device)
        found = run(suite, task, suite.many_images.precision, options.device, shards)
        files.write_json(root / MANY_IMAGES / f"{options.task}.json", found)
        lock.close()
        code = 0
    except* (ValueError, OSError) as group:
        for error in group.exceptions:
            print(f"error: {error}", file=sys.stderr)
    finally:
        os.chdir(root)
    return code


if __name__ == "__main__":
    sys.exit(main())
