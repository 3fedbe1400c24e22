"""Command line of the suite: one subcommand a stage. `dvc repro` calls them in order."""

from __future__ import annotations

import argparse
import os
import sys

from benchmarks import params
from benchmarks.record import FULL_PRECISION, Cell
from benchmarks.stages import calibrate, files, generate, reference, score, tables

DEVICE_VARIABLE = "TFMQ_BENCH_DEVICE"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True, metavar="STAGE")

    def stage(name: str, text: str, device: bool = True) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        if device:
            command.add_argument(
                "--device",
                default=os.environ.get(DEVICE_VARIABLE, "auto"),
                choices=("auto", "cpu", "cuda"),
                help=f"where to compute (default: the variable {DEVICE_VARIABLE}, else CUDA where there is one)",
            )
        return command

    for name, text in (
        ("calibrate", "Record the calibration pool of a task in one full-precision sampling pass."),
        ("reference", "Extract what a task's cells are compared with: full-precision samples and the data set."),
    ):
        stage(name, text).add_argument("--task", required=True, help="a task of params.yaml")
    for name, text in (
        ("generate", "Quantise one cell's model and sample its images; a killed run continues when started again."),
        ("score", "Score one cell's images and write its record."),
    ):
        command = stage(name, text)
        command.add_argument("--task", required=True, help="a task of params.yaml")
        command.add_argument("--method", required=True, help=f"a method of params.yaml, or {FULL_PRECISION}")
        command.add_argument("--precision", default="w32a32", help="such as w4a8 (default: %(default)s)")
        command.add_argument(
            "--seed", type=int, default=0, help="seed of noise and quantisation (default: %(default)s)"
        )
        if name == "generate":
            command.add_argument("--shards", type=int, help="processes that share the sampling (default: one a core)")
    stage("tables", "Regenerate leaderboard, CSV, figures and the README's table from all records.", device=False)
    return top


def main(arguments: list[str] | None = None) -> int:
    """Run one stage; user errors end in one line on standard error and exit code 1."""
    options = parser().parse_args(arguments)
    try:
        suite = params.load(files.PARAMS)
        if options.command == "calibrate":
            calibrate.run(suite, options.task, options.device)
        elif options.command == "reference":
            reference.run(suite, options.task, options.device)
        elif options.command == "tables":
            print(tables.run(suite))
        else:
            cell = Cell(options.task, options.method, options.precision, options.seed)
            if options.command == "score":
                score.run(suite, cell, options.device)
            else:
                shards = options.shards or generate.default_shards(options.device)
                generate.run(suite, cell, options.device, shards)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
