"""Carry committed results over to changed code that computes the same.

A rename or a new feature changes the hashes of code in `dvc.lock`, so that every result counts as stale. Where cells
that were reproduced with the changed code are their records bit for bit, the results may be called those of that code
without hours of making them again: `nox -s reproduce -- CELL ... --carry-over`. How many cells that takes is for the
one who commits to judge; the commit message names them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.upkeep import freshness

# What writes tables and figures: it runs in a minute where all of work/ is, and no cell tells whether it is right.
REPORT = ("benchmarks/report/", "benchmarks/stages/tables.py")


def check(root: Path) -> None:
    """Raise ValueError if more than code has changed since the results were made, or code that writes the tables."""
    changed = _changed(freshness.status(root))
    if not changed:
        raise ValueError("the committed results are those of the code already: there is nothing to carry over")
    others = [cause for cause in changed if not cause.split(" is ")[0].endswith(".py")]
    others += [cause for cause in changed if cause.startswith(REPORT)]
    if others:
        raise ValueError(
            f"{'; '.join(others[:3])}: only code of the other stages can be carried over. Run `nox -s bench -- --all`"
        )


def carry_over(root: Path) -> int:
    """Write the present hashes of code to `dvc.lock`, those of files that are not here stay; returns the stages."""
    from dvc.repo import Repo
    from dvc.stage.serialize import to_single_stage_lockfile
    from dvc.utils.serialize import modify_yaml

    repo = Repo(str(root))
    stages = [stage for stage in repo.index.stages if stage.path_in_repo == "dvc.yaml"]
    with repo.lock, modify_yaml(root / "dvc.lock") as lock:
        for stage in stages:
            stage.save(allow_missing=True, run_cache=False)
            lock["stages"][stage.name] = to_single_stage_lockfile(stage)
    return len(stages)


def _changed(status: Mapping[str, Sequence[object]]) -> list[str]:
    """What has changed of the stages that have results, each thing once."""
    small = {stage: entries for stage, entries in status.items() if ":" not in stage and not stage.endswith(".dvc")}
    return list(dict.fromkeys(cause for entries in small.values() for cause in freshness.causes(entries, _in_work)))


def _in_work(path: str) -> bool:
    """Whether a clone lacks a path: what stages hand on to each other."""
    return path.startswith("work/")
