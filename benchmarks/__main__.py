"""Command line of the suite: one subcommand a stage. `dvc repro` calls them in order."""

from __future__ import annotations

import argparse
import importlib
import math
import os
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import yaml

from benchmarks.suite import discover, params
from benchmarks.suite.record import FULL_PRECISION
from benchmarks.upkeep import DEVICE_VARIABLE, INTERRUPTED, STOPPED

PARAMS = Path("params.yaml")
# A suite is a folder with params.yaml and dvc.yaml, and all its paths are relative to it.
SUITES = {"paper": Path(__file__).parent / "paper"}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True, metavar="STAGE")

    def stage(name: str, text: str, device: bool = True) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument(
            "--suite", choices=tuple(SUITES), help="the suite to work on (default: that of the working directory)"
        )
        if device:
            command.add_argument(
                "--device",
                default=os.environ.get(DEVICE_VARIABLE, "auto"),
                choices=("auto", "cpu", "cuda"),
                help=f"where to compute (default: the variable {DEVICE_VARIABLE}, else CUDA where there is one)",
            )
        return command

    def add_shards(command: argparse.ArgumentParser) -> None:
        command.add_argument(
            "--shards",
            type=_count,
            help="processes that share the work (default: one a core, or one a GPU); on a cluster, all it has do",
        )

    command = stage(
        "fetch", "Download a file of sources.yaml to downloads/, or go on with it, and check its hash.", device=False
    )
    command.add_argument("--source", required=True, help="a name in sources.yaml")
    command.add_argument("--file", type=Path, help="take this file, which you have already, instead of downloading it")
    stage("prompts", "Write the captions that the committed lists name, from COCO's annotations.", device=False)
    command = stage("weights", "Make the folder of a fetched evaluator or CLIP.", device=False)
    command.add_argument("--source", required=True, help="a name in sources.yaml")
    command = stage("convert", "Convert a task's original checkpoint to a diffusers folder.", device=False)
    command.add_argument("--task", required=True, help="a task of params.yaml")
    command = stage("plan", "Say what cells will cost: evaluations, steps, images, disk, memory and hours.")
    command.add_argument("--task", nargs="+", default=[], help="tasks of params.yaml (default: all)")
    command.add_argument("--method", nargs="+", default=[], help="methods whose cells are planned (default: all)")
    another = command.add_mutually_exclusive_group()
    another.add_argument(
        "--teraflops",
        type=_rate,
        metavar="N",
        help="give hours of a device that does so many 10^12 floating-point operations a second on these networks,"
        " in place of this device's",
    )
    another.add_argument(
        "--like",
        metavar="NAME",
        help="give hours of a device that was measured: results/devices/NAME.json, as gpu-check writes it",
    )
    command = stage(
        "rehearse",
        "Quantise a task's network with random weights, to see what it takes and covers; writes results/REHEARSALS.md.",
    )
    command.add_argument("--task", required=True, help="a task of params.yaml")
    command.add_argument("--method", required=True, help="a method of the table")
    command.add_argument("--table", required=True, help="a table of params.yaml")
    command.add_argument("--precision", default="w4a8", help="such as w8a8 (default: w4a8)")
    command.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings of the method, such as iterations=100"
    )
    for name, text in (
        (
            "calibrate",
            "Record the calibration pools of a task, one a calibration seed, in a full-precision sampling pass each.",
        ),
        ("reference", "Extract what a task's cells are compared with: full-precision samples and the data set."),
    ):
        command = stage(name, text)
        command.add_argument("--task", required=True, help="a task of params.yaml")
        add_shards(command)
    for name, text in (
        (
            "generate",
            "Quantise the models of rows of a table, one a precision, and sample their images; a killed run continues"
            " when started again.",
        ),
        ("score", "Score the images of rows of a table and write their records."),
    ):
        command = stage(name, text)
        command.add_argument("--task", nargs="+", help="tasks of params.yaml (default: all of the table)")
        command.add_argument(
            "--method", nargs="+", help=f"methods of the table (default: all), or {FULL_PRECISION} alone"
        )
        command.add_argument("--table", help=f"a table of params.yaml; {FULL_PRECISION} needs none")
        command.add_argument(
            "--precision", nargs="+", default=[], help="such as w4a8 (default: all precisions of the table)"
        )
        command.add_argument(
            "--seed", type=int, help="calibration seed (default: all that the table has for each precision)"
        )
        add_shards(command)
    command = stage(
        "rounds",
        "Say which claims of a task are decided by the images that its cells have, by a test that may look after each"
        " round of `rounds` in params.yaml, and which cells go on.",
    )
    command.add_argument("--task", required=True, help="a task under `rounds` of params.yaml")
    command.add_argument(
        "--draw",
        action="store_true",
        help="quantise the cells that are missing, and draw round after round until all claims are decided or no round"
        " is left; a run that was stopped goes on",
    )
    command.add_argument(
        "--full",
        nargs="+",
        default=[],
        metavar="CELL",
        help="draw all images of these cells, such as tfmq-published/w4a8 or full_precision/w32a32, going on from those"
        " of their rounds: what papers' FIDs are computed from. `dvc repro` does it for all cells. Takes what"
        " `reference` makes; writes results/full, which `tables` shows beside the papers' numbers",
    )
    command = stage(
        "latency",
        "Execute a task's network with integers, and time it beside full precision and NNCF's own quantisation; without"
        " a checkpoint the weights are random. Writes results/latency and results/DEPLOYMENT.md.",
        device=False,
    )
    command.add_argument("--task", required=True, help="a task under `deployment` of params.yaml")
    command.add_argument(
        "--without", nargs="+", default=[], metavar="ENGINE", help="engines to leave out, such as nncf-w8a8"
    )
    command = stage(
        "study",
        "Quantise a task's network by the methods and settings under `study` of params.yaml, and measure how near each"
        " comes to full precision in how many CPU seconds. Writes results/study and results/STUDY.md; a run that was"
        " stopped goes on.",
        device=False,
    )
    command.add_argument("--task", required=True, help="a task under `study` of params.yaml")
    command = stage(
        "temporal",
        "Which time step each quantised network takes another one for, and how far its temporal features alone lead"
        " sampling from full precision. Writes results/temporal; `tables` makes a page of it.",
        device=False,
    )
    command.add_argument("--task", required=True, help="a task under `temporal` of params.yaml")
    stage(
        "tables",
        "Regenerate all tables, pages and figures in results/, and the summary in README.md, from all records.",
        device=False,
    )
    return top


def main(arguments: list[str] | None = None) -> int:
    """Run one stage. Errors a user can act on print one line each and give exit code 1; Ctrl-C gives 130."""
    options = parser().parse_args(arguments)
    try:
        return _run(options)
    except KeyboardInterrupt:
        print(STOPPED, file=sys.stderr)
        return INTERRUPTED


def _run(options: argparse.Namespace) -> int:
    code = 0
    try:
        stage = importlib.import_module(f"benchmarks.stages.{options.command}")
        if getattr(options, "file", None):
            options.file = options.file.resolve()
        if options.suite:
            os.chdir(SUITES[options.suite])
        found = stage.run(*ARGUMENTS[options.command](options))
        if isinstance(found, str):
            print(found)
    except* (ValueError, OSError) as group:
        for error in group.exceptions:
            print(": ".join(["error", *getattr(error, "__notes__", []), str(error)]), file=sys.stderr)
        code = 1
    return code


def _of_task(options: argparse.Namespace) -> tuple:
    suite = params.load(PARAMS)
    params.check_methods(suite)  # rather now than after these stages
    return suite, options.task, options.device, _shards(options)


def _of_cells(options: argparse.Namespace) -> tuple:
    from benchmarks.stages import _setup

    suite = params.load(PARAMS)
    if options.method != [FULL_PRECISION] and not options.table:
        raise ValueError(f"--table is missing: give one of {', '.join(suite.tables)}")
    if options.table and options.table not in suite.tables:
        raise discover.unknown("table", options.table, suite.tables, "Tables stand in params.yaml.")
    table = suite.tables[options.table] if options.table else None
    tasks = options.task or (suite.tasks if table is None else table.tasks)
    methods = options.method or table.methods
    cells = [
        cell
        for task, method in product(dict.fromkeys(tasks), dict.fromkeys(methods))
        for cell in _setup.cells_of(suite, options.table, task, method, options.precision, options.seed)
    ]
    return suite, cells, options.device, _shards(options)


def _of_rehearsal(options: argparse.Namespace) -> tuple:
    from benchmarks.stages import _setup

    suite = params.load(PARAMS)
    (cell,) = _setup.cells_of(suite, options.table, options.task, options.method, [options.precision], 0)
    changes = {}
    for text in options.set:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set {text}: write NAME=VALUE, such as iterations=100")
        changes[name] = yaml.safe_load(value)
    return suite, cell, changes, options.device


# What the `run` of each stage is called with.
ARGUMENTS: dict[str, Callable[[argparse.Namespace], tuple]] = {
    "fetch": lambda options: (options.source, options.file),
    "prompts": lambda options: (),
    "weights": lambda options: (options.source,),
    "convert": lambda options: (params.load(PARAMS), options.task),
    "plan": lambda options: (
        params.load(PARAMS),
        options.task,
        options.device,
        options.teraflops,
        options.method,
        options.like,
    ),
    "rehearse": _of_rehearsal,
    "calibrate": _of_task,
    "reference": _of_task,
    "generate": _of_cells,
    "score": _of_cells,
    "rounds": lambda options: (params.load(PARAMS), options.task, options.device, options.draw, options.full),
    "latency": lambda options: (params.load(PARAMS), options.task, options.without),
    "study": lambda options: (params.load(PARAMS), options.task),
    "temporal": lambda options: (params.load(PARAMS), options.task),
    "tables": lambda options: (params.load(PARAMS),),
}


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def _rate(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return found


def _shards(options: argparse.Namespace) -> int:
    from benchmarks.runtime import workers
    from benchmarks.runtime.devices import device_of

    return options.shards or workers.default_shards(device_of(options.device))


if __name__ == "__main__":
    sys.exit(main())
