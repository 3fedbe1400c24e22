"""A stage of dvc.yaml: what it runs, needs and makes, and how that is written."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from tfmq.closure import ROOT, closure

WIDTH = 120
STAGES = ROOT / "benchmarks" / "stages"
OF_TASKS = ("foreach", "${inputs}")
# Modules that carry results from one place to another and decide nothing of them.
BYSTANDERS = tuple(
    f"benchmarks/{name}"
    for name in (
        "__main__.py",
        "runtime/devices.py",
        "runtime/engine.py",
        "runtime/environment.py",
        "runtime/excerpt.py",
        "runtime/files.py",
        "runtime/manifest.py",
        "runtime/workers.py",
        "runtime/workspace.py",
        "suite/discover.py",
        "suite/fields.py",
        "suite/params.py",
        "suite/sections.py",
        "suite/tasks.py",
    )
)


@dataclass(frozen=True)
class Stage:
    """One entry of dvc.yaml.

    Attributes:
        name: of it, or of the group.
        why: a comment.
        command: what runs.
        deps, params: what it depends on, besides code.
        code: files whose code it depends on, from the repository's root; `${...}` may stand in them.
        outs: paths that it makes, with DVC's options.
        over: what makes a group of it: ``foreach`` or ``matrix``, with its value.
    """

    name: str
    why: str
    command: str
    deps: Sequence[str] = ()
    code: Iterable[str] = ()
    params: Sequence[str | Mapping[str, Sequence[str]]] = ()
    outs: Mapping[str, str] = field(default_factory=dict)
    over: tuple[str, object] | None = None


def code_of(*entries: Path) -> set[str]:
    """Paths, from the root, of the code that ``entries`` import and that can decide a result."""
    found = {path.relative_to(ROOT).as_posix() for path in closure(*entries)}
    return {path for path in found if path not in BYSTANDERS}


def entry(folder: Path, stage: Stage) -> str:
    """One stage as YAML, two spaces in."""
    code = [Path(os.path.relpath(path, folder)).as_posix() for path in stage.code]
    body: dict[str, object] = {"cmd": stage.command}
    body["deps"] = [*sorted(code), *stage.deps]
    body["params"] = list(stage.params)
    body["outs"] = [{path: yaml.safe_load(options)} for path, options in stage.outs.items()]
    body = {key: value for key, value in body.items() if value}
    if stage.over is not None:
        kind, items = stage.over
        body = {kind: items, "do": body} if kind == "foreach" else {kind: items, **body}
    text = yaml.safe_dump({stage.name: body}, sort_keys=False, width=1000, allow_unicode=True)
    comment = [f"# {line}" for line in textwrap.wrap(stage.why, WIDTH - 4)]
    return textwrap.indent("\n".join([*comment, text.rstrip()]), "  ")
