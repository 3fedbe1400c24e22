"""Make cells of the committed results anew, from nothing, and compare them with their records.

Works in a scratch folder inside .resume/: results/, work/ and all else stay as they are. A run that is stopped goes on
where it was when it is started again with the same code. Exit code 1 if a cell differs from its record or fails.
"""

from __future__ import annotations

import argparse
import difflib
import fcntl
import fnmatch
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from benchmarks.params import Suite
    from benchmarks.record import Cell, Record
    from benchmarks.upkeep.remake import Remake

INTERRUPTED = 130
DEVICE_VARIABLE = "TFMQ_BENCH_DEVICE"
SCRATCH = Path(".resume")
PREFIX = "reproduce-"
# What the suite's paths lead to, and the scratch folder has links to.
LINKED = ("data", "benchmarks", "params.yaml")
# What decides a cell, besides data/: unfinished work of other code or settings is never continued.
CODE = ("tfmq", "baselines", "benchmarks", "params.yaml", "data.dvc")
# Without names: every method of this table on this task at this precision, this method first, in so many minutes.
TABLE, TASK, PRECISION, FIRST = "leaderboard", "emoji-ldm4", "w4a8", "tfmq"
MINUTES = 10.0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.upkeep.reproduce", description=__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="CELL",
        help="cells such as emoji-ldm4/tfmq/w4a8, with w4a8-s1 for calibration seed 1 and tfmq-published for the"
        " protocol `published`; rows such as emoji-ldm4/tfmq; tasks such as emoji-text; patterns such as"
        f" 'emoji-*/tfmq/*'. Without any: every method of the leaderboard on {TASK} at {PRECISION}, seed 0",
    )
    parser.add_argument("--random", type=int, metavar="N", help="N cells drawn from these, or from all")
    parser.add_argument("--draw", type=int, metavar="SEED", help="the seed of --random (default: a new one)")
    parser.add_argument(
        "--minutes",
        type=float,
        metavar="M",
        help="begin no cell that would end after so many minutes, so that a slow machine makes fewer (default:"
        f" {MINUTES} where no cell is named, else no limit)",
    )
    parser.add_argument(
        "--device",
        default=os.environ.get(DEVICE_VARIABLE, "auto"),
        choices=("auto", "cpu", "cuda"),
        help=f"where to compute (default: the variable {DEVICE_VARIABLE}, else CUDA where there is one)",
    )
    parser.add_argument("--shards", type=int, metavar="N", help="processes (default: one a core, or one a GPU)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="move what was made to a new folder at the end")
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
    from benchmarks import params
    from benchmarks.stages import setup, workers
    from benchmarks.upkeep.clock import spoken
    from benchmarks.upkeep.remake import Remake
    from benchmarks.upkeep.screen import HEADER

    began = time.monotonic()
    suite = params.load(Path("params.yaml"))
    params.check_methods(suite)
    for name in ("random", "minutes", "shards"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name} is {value}, but has to be more than 0")
    cells = chosen(suite, options.names, options.random, options.draw)
    keep = None if options.keep is None else options.keep.resolve()
    if keep is not None and keep.exists():
        raise ValueError(f"--keep {options.keep}: there is something already; name a new folder")
    minutes = options.minutes or (None if options.names or options.random else MINUTES)
    device = setup.device_of(options.device)
    shards = options.shards or workers.default_shards(device)
    committed, root = read_records(suite), Path.cwd()
    scratch = _open_scratch(root)
    os.chdir(scratch)
    seconds = None if minutes is None else minutes * 60 - (time.monotonic() - began)
    remake = Remake(suite, committed, cells, device, shards, seconds)
    processes = f"{shards} process" + ("es" if shards > 1 else "")
    limit = "" if minutes is None else f", of at most {minutes:g} min"
    remake.screen.write(
        f"{remake.screen.total} cells to make anew with {processes}: about {spoken(remake.clock.left())}{limit}."
        f" results/ stays as it is.\n\n{HEADER}"
    )
    remake.run()
    os.chdir(root)
    if keep is not None:
        for name in LINKED:
            (scratch / name).unlink()
        keep.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(scratch, keep)
    shutil.rmtree(scratch, ignore_errors=True)
    return tell(remake, time.monotonic() - began)


def read_records(suite: Suite) -> dict[Cell, Record]:
    """The records in results/ of the suite's cells, as far as they are there. Raises ValueError for a damaged one."""
    from benchmarks.record import Record
    from benchmarks.stages import files

    found = {}
    for cell in suite.cells():
        path = files.record_file(cell)
        if path.is_file():
            try:
                found[cell] = Record.from_json(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{path} is no record: {error}; `git checkout {path}` brings it back") from None
    return found


def chosen(suite: Suite, names: Sequence[str], count: int | None = None, seed: int | None = None) -> list[Cell]:
    """The cells that are named, or the default ones, or ``count`` random ones of those that are named or of all.

    Raises ValueError for a name that fits no cell, with the nearest one.
    """
    every = suite.cells()
    if not names and count is None:
        of_task = [cell for cell in suite.measured(TABLE) if (cell.task, cell.precision) == (TASK, PRECISION)]
        return sorted((cell for cell in of_task if cell.seed == 0), key=lambda cell: cell.method != FIRST)
    found: dict[Cell, None] = {} if names else dict.fromkeys(every)
    for name in names:
        fitting = [cell for cell in every if _fits(cell, name)]
        if not fitting:
            known = [known for cell in every for known in (cell.task, f"{cell.task}/{cell.row}", cell.name)]
            nearest = difflib.get_close_matches(name, dict.fromkeys(known), n=1)
            guess = f"did you mean {nearest[0]!r}? " if nearest else ""
            raise ValueError(
                f"no cell, row or task is named {name!r}: {guess}Cells are named as the files in results/records, such"
                f" as {TASK}/{FIRST}/{PRECISION}; patterns such as '{TASK}/*/{PRECISION}' are names too."
            )
        found |= dict.fromkeys(fitting)
    if count is None:
        return list(found)
    drawn = set(random.Random(seed).sample(list(found), min(count, len(found))))
    return [cell for cell in found if cell in drawn]


def _fits(cell: Cell, name: str) -> bool:
    named = (cell.task, f"{cell.task}/{cell.row}", cell.name)
    return any(fnmatch.fnmatchcase(known, name.rstrip("/").removesuffix(".json")) for known in named)


def tell(remake: Remake, seconds: float) -> int:
    """Print what came of it, the committed leaderboard, and what was not made anew; returns the exit code."""
    from benchmarks import tables
    from benchmarks.upkeep.clock import spoken

    screen = remake.screen
    by_verdict: dict[str, list[str]] = {}
    for cell, agreement in screen.agreements.items():
        by_verdict.setdefault(agreement.verdict, []).append(cell.name)
    differing = by_verdict.get("differs", [])
    text = Path("README.md").read_text(encoding="utf-8")
    print(f"\nThe committed leaderboard of all tasks:\n\n{tables.region(text).strip()}\n")
    print("All tables and figures: results/README.md. What each method does: results/METHODS.md.")
    left = len(remake.suite.cells()) - len(screen.made)
    print(
        f"Not made anew here: {left} of {len(remake.suite.cells())} cells. `nox -s reproduce -- CELL` makes any of"
        " them, `nox -s bench -- TASK` all of a task, `nox -s bench -- --all` everything."
    )
    if remake.skipped:
        print(f"Left out, since they did not fit into the time: {', '.join(cell.name for cell in remake.skipped)}")
    print()
    for cell, error in remake.failures:
        reasons = error.exceptions if isinstance(error, ExceptionGroup) else [error]
        print(f"{cell.name} failed: {'; '.join(' '.join(str(reason).split()) for reason in reasons)}")
    counts = ", ".join(f"{len(names)} {WORDS[verdict]}" for verdict, names in by_verdict.items())
    print(f"{len(screen.made)} cells made anew in {spoken(seconds)}: {counts or 'none'}.")
    if differing:
        print(f"These differ from their committed records, see above: {', '.join(differing)}")
    return 1 if differing or remake.failures else 0


WORDS = {
    "identical": "equal to their records bit for bit",
    "agrees": "agree with their records (other processor or versions)",
    "differs": "differ",
    "no committed record": "without a committed record",
}


def _open_scratch(root: Path) -> Path:
    """The scratch folder of this code and these settings; those of other ones are removed.

    Raises ValueError if another run is at work in it.
    """
    from benchmarks.stages import files

    key = files.fingerprint([files.source_hash(root / name) for name in CODE])
    folder = root / SCRATCH / f"{PREFIX}{key}"
    for superseded in folder.parent.glob(f"{PREFIX}*"):
        if superseded != folder and superseded.is_dir():
            shutil.rmtree(superseded)
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(f"another run is at work in {folder.relative_to(root)}: wait for it, or stop it") from None
    LOCKS.append(lock)
    for name in LINKED:
        link = folder / name
        link.unlink(missing_ok=True)
        link.symlink_to(root / name)
    return folder


# Held until this process ends.
LOCKS = []


def _stop(signum: int, frame: object) -> NoReturn:
    """Ctrl-C: end at once, with one line and no process left."""
    for child in multiprocessing.active_children():
        child.kill()
    print("\nstopped; what is finished is kept, and the same command goes on from there", file=sys.stderr, flush=True)
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
