"""Reproduce cells of the committed results from nothing, and compare them with their records.

Works in a scratch folder inside .resume/: results/, work/ and all else stay as they are. A run that is stopped, or of
which a cell fails, goes on where it was when it is started again with the same code. Exit code 1 if a cell differs from
its record or fails, or if there was nothing to compare.
"""

from __future__ import annotations

import argparse
import difflib
import fnmatch
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from benchmarks.upkeep import DEVICE_VARIABLE, INTERRUPTED, STOPPED

if TYPE_CHECKING:
    from benchmarks.suite.params import Suite
    from benchmarks.suite.record import Cell, Record
    from benchmarks.upkeep.remake import Remake

# Without names: every method of this table on this task at this precision, this method first, in so many minutes.
TABLE, TASK, PRECISION, FIRST = "leaderboard", "emoji-ldm4", "w4a8", "tfmq"
MINUTES = 10.0
WORDS = {
    "identical": "identical, bit for bit",
    "agrees": "agree (other processor or versions)",
    "differs": "differ",
    "no committed record": "without a committed record",
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="nox -s reproduce --", description=__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="CELL",
        help="cells such as emoji-ldm4/tfmq/w4a8, with w4a8-s1 for calibration seed 1 and tfmq-published for the"
        " protocol `published`; rows such as emoji-ldm4/tfmq; tasks such as emoji-text; patterns such as '*/tfmq/*'."
        f" Without any: every method of the leaderboard on {TASK} at {PRECISION}, seed 0",
    )
    parser.add_argument("--random", type=int, metavar="N", help="N cells drawn from these, or from all")
    parser.add_argument("--draw", type=int, metavar="SEED", help="the seed of --random (default: a new one, printed)")
    parser.add_argument(
        "--minutes",
        type=float,
        metavar="M",
        help="begin no cell that would end after so many minutes, so that a slow machine makes fewer (default:"
        f" {MINUTES:g} where no cell is named, else no limit)",
    )
    parser.add_argument(
        "--device",
        default=os.environ.get(DEVICE_VARIABLE, "auto"),
        choices=("auto", "cpu", "cuda"),
        help=f"where to compute (default: the variable {DEVICE_VARIABLE}, else CUDA where there is one)",
    )
    parser.add_argument("--shards", type=int, metavar="N", help="processes (default: one a core, or one a GPU)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="move what was made to a new folder at the end")
    parser.add_argument(
        "--carry-over",
        action="store_true",
        help="if every cell is identical, bit for bit, and nothing but code has changed since the results were made:"
        " write that the committed results are those of this code (dvc.lock), so that nothing has to be made again",
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Command line; see the module's text."""
    signal.signal(signal.SIGINT, _stop)
    options = parser().parse_args(arguments)
    code = 1
    try:
        code = run(options)
    except* (ValueError, OSError) as group:
        for error in group.exceptions:
            print(": ".join(["error", *getattr(error, "__notes__", []), str(error)]), file=sys.stderr)
    return code


def run(options: argparse.Namespace) -> int:
    """Make the cells that the options name, compare and tell; returns the exit code.

    Raises ValueError for names that the suite does not have, and for values that make no sense.
    """
    # Not above: these take seconds, in which Ctrl-C has to be heard.
    from benchmarks.runtime import workers
    from benchmarks.runtime.devices import device_of
    from benchmarks.suite import params
    from benchmarks.upkeep import carry_over
    from benchmarks.upkeep.clock import spoken
    from benchmarks.upkeep.remake import Remake
    from benchmarks.upkeep.scratch import LINKED, open_scratch
    from benchmarks.upkeep.screen import HEADER

    began = time.monotonic()
    for name in ("random", "minutes", "shards"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name} is {value}, but has to be more than 0")
    if options.draw is not None and options.random is None:
        raise ValueError("--draw is the seed of --random: give that too")
    suite = params.load(Path("params.yaml"))
    params.check_methods(suite)
    if options.carry_over:
        carry_over.check(Path())
    drawn = random.SystemRandom().randrange(10**6) if options.draw is None else options.draw
    cells = chosen(suite, options.names, options.random, drawn)
    keep = None if options.keep is None else options.keep.resolve()
    if keep is not None and keep.exists():
        raise ValueError(f"--keep {options.keep} exists already: give a new folder")
    minutes = options.minutes or (None if options.names or options.random else MINUTES)
    device = device_of(options.device)
    shards = options.shards or workers.default_shards(device)
    committed, root = read_records(suite), Path.cwd()
    scratch, lock = open_scratch(root, device)
    os.chdir(scratch)
    seconds = None if minutes is None else minutes * 60 - (time.monotonic() - began)
    remake = Remake(suite, committed, cells, device, shards, seconds)
    processes = f"{shards} process" + ("es" if shards > 1 else "")
    limit = "" if minutes is None else f", at most {minutes:g} min"
    again = "" if options.random is None else f" Drawn with --draw {drawn}."
    remake.screen.write(
        f"Reproducing {remake.screen.total} cells with {processes}: about {spoken(remake.clock.left())}{limit}.{again}"
        f" results/ stays as it is.\n\n{HEADER}"
    )
    remake.run()
    os.chdir(root)
    code = tell(remake, time.monotonic() - began)
    if keep is not None:
        for name in LINKED:
            (scratch / name).unlink()
        keep.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(scratch, keep)
    elif remake.failures or remake.skipped:
        print(f"What is finished is kept in {scratch.relative_to(root)} for the next run.")
    else:
        shutil.rmtree(scratch)
    lock.close()
    if options.carry_over:
        code = _carried_over(remake, root, code)
    return code


def _carried_over(remake: Remake, root: Path, code: int) -> int:
    """Carry the committed results over if all cells that were asked for are identical; returns the exit code."""
    from benchmarks.upkeep import carry_over

    found = {agreement.verdict for agreement in remake.screen.agreements.values()}
    if code or remake.skipped or found != {"identical"}:
        print("Nothing is carried over: that takes every cell, identical bit for bit.")
        return 1
    print(f"Carried over: dvc.lock has this code in {carry_over.carry_over(root)} stages.")
    return 0


def read_records(suite: Suite) -> dict[Cell, Record]:
    """The records in results/ of the suite's cells, as far as they are there.

    Raises ValueError for one that cannot be read.
    """
    from benchmarks.runtime import files
    from benchmarks.suite.record import Record

    found = {}
    for cell in suite.cells():
        path = files.record_file(cell)
        if path.is_file():
            try:
                found[cell] = Record.from_json(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(
                    f"{path} cannot be read by this code ({error}): restore it, or score it again"
                ) from None
    return found


def chosen(suite: Suite, names: Sequence[str], count: int | None = None, seed: int | None = None) -> list[Cell]:
    """The cells that are named, or the default ones, or ``count`` random ones of those that are named or of all.

    Raises ValueError for a name that fits no cell, with the nearest one, and where the default ones are none.
    """
    every = suite.cells()
    if not names and count is None:
        table = suite.measured(TABLE) if TABLE in suite.tables else []
        found = [c for c in table if (c.task, c.precision, c.seed) == (TASK, PRECISION, 0)]
        if not found:
            raise ValueError(f"params.yaml measures no {TASK} at {PRECISION} in {TABLE}: name the cells to reproduce")
        return sorted(found, key=lambda cell: cell.method != FIRST)
    named: dict[Cell, None] = {} if names else dict.fromkeys(every)
    for name in names:
        plain = name.removeprefix("results/records/").removesuffix(".json").rstrip("/")
        fitting = [cell for cell in every if _fits(cell, plain)]
        if not fitting:
            known = [known for cell in every for known in (cell.task, f"{cell.task}/{cell.row}", cell.name)]
            known += [f"*/{cell.row}/*" for cell in every if cell.row == plain]
            nearest = difflib.get_close_matches(plain, dict.fromkeys(known), n=1, cutoff=0.4)
            guess = f"did you mean {nearest[0]!r}? " if nearest else ""
            raise ValueError(
                f"no cell, row or task is named {name!r}: {guess}Cells are named as the files in results/records, such"
                f" as {TASK}/{FIRST}/{PRECISION}; patterns such as '*/{FIRST}/*' are names too."
            )
        named |= dict.fromkeys(fitting)
    if count is None:
        return list(named)
    drawn = set(random.Random(seed).sample(list(named), min(count, len(named))))
    return [cell for cell in named if cell in drawn]


def _fits(cell: Cell, name: str) -> bool:
    return any(fnmatch.fnmatchcase(known, name) for known in (cell.task, f"{cell.task}/{cell.row}", cell.name))


def tell(remake: Remake, seconds: float) -> int:
    """Print the committed summary, what was not reproduced, and the outcome; returns the exit code."""
    from benchmarks.report import tables
    from benchmarks.upkeep.clock import spoken

    screen = remake.screen
    with suppress(OSError, ValueError):  # a README without the table
        region = tables.region(Path("README.md").read_text(encoding="utf-8")).strip()
        print(f"\nThe committed results over all tasks:\n\n{region}\n")
        print("All tables and figures: results/README.md. What each method does: results/METHODS.md.")
    every = remake.suite.cells()
    print(
        f"Not reproduced here: {len(every) - len(screen.made)} of {len(every)} cells. `nox -s reproduce -- CELL` makes"
        " any of them, `nox -s bench -- TASK` all of a task, `nox -s bench -- --all` everything."
    )
    if remake.skipped:
        print(f"Left out for lack of time: {', '.join(cell.name for cell in remake.skipped)}")
    print()
    for cell, error in remake.failures:
        reasons = error.exceptions if isinstance(error, ExceptionGroup) else [error]
        print(f"{cell.name} failed: {'; '.join(_reason(reason) for reason in reasons)}")
    by_verdict: dict[str, list[str]] = {}
    for cell, agreement in screen.agreements.items():
        by_verdict.setdefault(agreement.verdict, []).append(cell.name)
    counts = ", ".join(f"{len(names)} {WORDS[verdict]}" for verdict, names in by_verdict.items())
    print(f"{_cells(len(screen.made))} in {spoken(seconds)}: {counts or 'none'}.")
    differing = by_verdict.get("differs", [])
    if differing:
        print(f"These differ from their committed records, see above: {', '.join(differing)}")
    compared = any(cell in screen.made for cell in remake.cells) or not remake.cells
    if not compared:
        print("No quantised cell was compared: give more time, as in `--minutes 30`.")
    return 1 if differing or remake.failures or not compared else 0


def _cells(count: int) -> str:
    return f"{count} cell" + ("" if count == 1 else "s")


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {text}"


def _stop(signum: int, frame: object) -> NoReturn:
    """Ctrl-C: end at once, with one line and no process left."""
    for child in multiprocessing.active_children():
        child.kill()
    print(f"\n{STOPPED}", file=sys.__stderr__, flush=True)
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
