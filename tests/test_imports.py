"""Imports point one way: torch <- tfmq <- baselines <- benchmarks, and methods never import each other."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tfmq

ROOMS = ("tfmq", "baselines", "benchmarks")
ROOT = Path(__file__).parents[1]


def imported(source: str) -> set[str]:
    """Dotted names of all modules that ``source`` imports, with `from a import b` as both a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def rooms(source: str) -> set[str]:
    return {name.split(".")[0] for name in imported(source)} & set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_one_way(room: str) -> None:
    allowed = set(ROOMS[: ROOMS.index(room) + 1])
    for path in sorted((ROOT / room).rglob("*.py")):
        later = rooms(path.read_text(encoding="utf-8")) - allowed
        assert not later, f"{path.relative_to(ROOT)} imports {later}: only {allowed} may be imported there"


def test_methods_never_import_each_other() -> None:
    methods = {path.stem for path in (ROOT / "baselines").glob("*.py") if not path.stem.startswith("_")}
    for method in sorted(methods):
        names = imported((ROOT / "baselines" / f"{method}.py").read_text(encoding="utf-8"))
        others = {name for name in names if name.startswith("baselines.") and name.split(".")[1] in methods - {method}}
        assert not others, f"baselines/{method}.py imports {others}: shared code belongs in tfmq or baselines/_*.py"


def test_nothing_needs_the_export_but_the_command_line() -> None:
    for path in sorted((ROOT / "tfmq").rglob("*.py")):
        if path.parent.name != "export" and path.name != "__main__.py":
            needed = {name for name in imported(path.read_text(encoding="utf-8")) if name.startswith("tfmq.export")}
            assert not needed, f"{path.relative_to(ROOT)} imports {needed}: only the command line may"


def test_the_check_sees_every_form_of_import() -> None:
    assert rooms("import tfmq.modules.layers as l") == {"tfmq"}
    assert rooms("def f():\n    from benchmarks import tables") == {"benchmarks"}
    assert imported("from baselines import nearest") == {"baselines", "baselines.nearest"}


def test_every_name_of_the_front_door_is_there() -> None:
    for name in tfmq.__all__:
        assert getattr(tfmq, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'quantise_'"):
        tfmq.quantise_  # noqa: B018


def test_scoring_does_not_wait_for_what_it_does_not_use() -> None:
    code = "import sys, benchmarks.__main__, benchmarks.stages.score, benchmarks.stages._setup; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    assert not {"diffusers", "pandas", "matplotlib"} & set(done.stdout.split())
