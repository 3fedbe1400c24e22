"""The code that a result depends on: the files that a module imports, directly or not."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("tfmq", "baselines", "benchmarks")
# Modules that only estimate: no result depends on them.
ESTIMATES = frozenset({ROOT / "tfmq" / "cost.py", ROOT / "tfmq" / "live_bytes.py"})


def closure(*entries: Path) -> list[Path]:
    """The files of this project that ``entries`` import, directly or not, and the entries themselves, sorted.

    Imports inside functions count, and so does a text that is the full name of a module; those for type checkers alone
    do not, nor does what only estimates. A module that is found by a part of its name, as a method or a metric is, is
    none of them: name it as an entry. Of an entry outside this project, modules beside it count too.
    """
    found: set[Path] = set()
    waiting = [path.resolve() for path in entries]
    while waiting:
        path = waiting.pop()
        if path not in found and path not in ESTIMATES:
            found.add(path)
            waiting += _imported(path, path.stat().st_mtime_ns)
    return sorted(found)


def code_hash(*entries: Path) -> str:
    """One hash over the code of a closure; comments, docstrings and layout do not count."""
    digest = hashlib.sha256()
    for path in closure(*entries):
        digest.update(_code(path, path.stat().st_mtime_ns).encode())
    return digest.hexdigest()


@cache
def _imported(path: Path, modified: int) -> frozenset[Path]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    files = {file for name in _texts(tree) if (file := ROOT.joinpath(*name.split(".")).with_suffix(".py")).is_file()}
    base = _base(path)
    for name in set(_names(tree)):
        parts = _home(name).split(".")
        for root in {ROOT, base} if base != ROOT else {ROOT}:
            if root == ROOT and parts[0] not in PACKAGES:
                continue
            for end in range(1, len(parts) + 1):  # a package is imported before what is in it
                place = root.joinpath(*parts[:end])
                files |= {file for file in (place / "__init__.py", place.with_suffix(".py")) if file.is_file()}
    return frozenset(file.resolve() for file in files)


def _base(path: Path) -> Path:
    """The folder that a file's absolute imports start from: the first one above it that is not a package."""
    folder = path.parent
    while (folder / "__init__.py").is_file():
        folder = folder.parent
    return folder


def _home(name: str) -> str:
    """The full name of what the front door, `tfmq`, finds elsewhere: of ``tfmq.Spaced`` the module that defines it."""
    package, _, attribute = name.partition(".")
    if package != "tfmq" or not attribute or "." in attribute:
        return name
    front = ROOT / "tfmq" / "__init__.py"
    return f"tfmq.{_homes(front, front.stat().st_mtime_ns).get(attribute, attribute)}"


@cache
def _homes(path: Path, modified: int) -> dict[str, str]:
    """The table of the front door, read without importing it."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_HOMES":
            return ast.literal_eval(node.value)
    return {}


def _texts(tree: ast.AST) -> Iterator[str]:
    """Texts that may be the full name of a module, such as that of a scheduler that is imported when it is needed."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            parts = node.value.split(".")
            if parts[0] in PACKAGES and len(parts) > 1 and all(part.isidentifier() for part in parts):
                yield node.value


def _names(node: ast.AST) -> Iterator[str]:
    """Dotted names that are imported, with `from a import b` as both a and a.b."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
        yield node.module
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    children: Iterable[ast.AST] = ast.iter_child_nodes(node)
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        children = node.orelse
    for child in children:
        yield from _names(child)


@cache
def _code(path: Path, modified: int) -> str:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node, clean=False
        ):
            node.body = node.body[1:]
    return ast.dump(tree)
