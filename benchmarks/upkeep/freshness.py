"""Are the committed results those of the committed code and settings?

`python -m benchmarks.upkeep.freshness` prints a line for each thing that is stale and exits 1 if there is any. It runs
no stage. Of the files that git does not keep, those of work/ may be missing: a fresh clone has only their hashes in
`dvc.lock`. Those of data/ may be missing too, but are only compared with what made the results when they are there.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import yaml

from benchmarks.report import tables

RECORDS = "results/records"
MISSING = ("deleted", "not in cache")
REMEDY = (
    "Run `nox -s bench -- --all` and commit results/ and dvc.lock. Where only code has changed and computes the same,"
    " reproduce cells with `nox -s reproduce -- CELL ... --carry-over` instead, and commit dvc.lock."
)


def stale(
    status: Mapping[str, Sequence[object]],
    lock: Mapping[str, Mapping[str, object]],
    stages: Sequence[str],
    ignored: Callable[[str], bool],
) -> list[str]:
    """Lines that say what is stale, empty when nothing is.

    ``status`` is the parsed output of `dvc status --json`, ``lock`` the stages of `dvc.lock`, ``stages`` the names of
    all stages now. A path that git ignores may be missing (a clone does not have it); a path in git may not.
    """
    lines = [f"{stage} was never run" for stage in stages if stage not in lock]
    stages_by_cause: dict[str, list[str]] = {}
    for stage, entries in status.items():
        if stage in stages and stage not in lock:
            continue
        for cause in causes(entries, ignored):
            stages_by_cause.setdefault(cause, []).append(stage)
    lines += [f"{cause}: {_some(names)}" for cause, names in stages_by_cause.items()]
    return lines + _broken_chain({name: lock[name] for name in stages if name in lock})


def orphans(records: Sequence[str], lock: Mapping[str, Mapping[str, object]], stages: Sequence[str]) -> list[str]:
    """Lines for the paths among ``records`` that no stage writes any more, alone or in a folder of its."""
    written = {out["path"] for stage in stages for out in lock.get(stage, {}).get("outs", [])}
    return [
        f"{path} is written by no stage: remove it"
        for path in records
        if written.isdisjoint([path, *(folder.as_posix() for folder in Path(path).parents)])
    ]


def find(root: Path) -> list[str]:
    """What is stale in the repository at ``root``; nothing where no results were made yet."""
    if not (root / "dvc.yaml").exists():
        return [f"there is no dvc.yaml in {root.resolve()}: run from the repository's root"]
    lock_file = root / "dvc.lock"
    if not lock_file.exists():
        return [f"results/ is there but dvc.lock is not. {REMEDY}"] if (root / "results").exists() else []
    lock = yaml.safe_load(lock_file.read_text(encoding="utf-8"))["stages"]
    stages = _run(root, sys.executable, "-m", "dvc", "stage", "list", "--name-only").split()
    changed = status(root)
    unmade = _unmade(root, list(changed))
    changed = {stage: entries for stage, entries in changed.items() if stage not in unmade}
    records = sorted(path.relative_to(root).as_posix() for path in (root / RECORDS).rglob("*.json"))
    lines = stale(changed, lock, stages, lambda path: _ignored(root, path)) + orphans(records, lock, stages)
    return lines + _readme(root)


def status(root: Path) -> dict[str, list[object]]:
    """What DVC finds changed in the repository at ``root``, by stage."""
    return json.loads(_run(root, sys.executable, "-m", "dvc", "status", "--json"))


def causes(entries: Sequence[object], ignored: Callable[[str], bool]) -> list[str]:
    """What has changed of one stage, from its entries in `dvc status`; ``ignored`` paths may be missing."""
    found = []
    for entry in entries:
        if isinstance(entry, str):  # "changed command", "changed checksum"
            found.append(entry)
            continue
        for path, state in entry.get("changed deps", {}).items():
            if isinstance(state, dict):
                found += [f"{path}: {key} is {change} since" for key, change in state.items()]
            elif state not in MISSING or not ignored(path):
                found.append(f"{path} is {state} since")
        for path, state in entry.get("changed outs", {}).items():
            if state not in MISSING or not ignored(path):
                found.append(f"{path} is {state}, but only its stage may write it")
    return found


def main() -> None:
    """Command line; see the module's text."""
    lines = find(Path())
    print("\n".join([*lines, REMEDY]) if lines else "the committed results are those of the code and settings")
    sys.exit(1 if lines else 0)


def _unmade(root: Path, stages: Sequence[str]) -> set[str]:
    """Stages of another dvc.yaml that were never run: that suite is run in parts, and there has no old results."""
    made = set()
    for file in {stage.rpartition(":")[0] for stage in stages if ":" in stage}:
        lock = (root / file).with_suffix(".lock")
        if lock.exists():
            made |= {f"{file}:{name}" for name in yaml.safe_load(lock.read_text(encoding="utf-8"))["stages"]}
    return {stage for stage in stages if ":" in stage and stage not in made}


def _broken_chain(lock: Mapping[str, Mapping[str, object]]) -> list[str]:
    """Stages that used another version of a file than the one its stage wrote last."""
    written = {out["path"]: (stage, out["md5"]) for stage, entry in lock.items() for out in entry.get("outs", [])}
    lines = []
    for stage, entry in lock.items():
        for dep in entry.get("deps", []):
            maker, md5 = written.get(dep["path"], (None, dep["md5"]))
            if md5 != dep["md5"]:
                lines.append(f"{maker} wrote {dep['path']} again since: {stage}")
    return lines


def _readme(root: Path) -> list[str]:
    """The README's leaderboard must be that of the results page."""
    text = (root / "README.md").read_text(encoding="utf-8")
    page = root / "results" / "README.md"
    if page.exists() and tables.region(text) not in page.read_text(encoding="utf-8"):
        return ["README.md: the leaderboard is not that of results/README.md"]
    return []


def _some(names: Sequence[str], shown: int = 3) -> str:
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")


def _ignored(root: Path, path: str) -> bool:
    return subprocess.run(["git", "check-ignore", "-q", path], cwd=root, check=False).returncode == 0


def _run(root: Path, *command: str) -> str:
    return subprocess.run(command, cwd=root, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    main()
