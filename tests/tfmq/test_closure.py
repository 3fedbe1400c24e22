"""What code decides a result, in a project of a few files."""

from __future__ import annotations

from pathlib import Path

import pytest

from tfmq import closure as module
from tfmq.closure import closure, code_hash

FILES = {
    "tfmq/__init__.py": "",
    "tfmq/a.py": '"""A."""\n\nimport os\n\nimport tfmq.deep.b\nfrom tfmq import c\n\n\n'
    'def f():\n    """Doc."""\n    return 1\n',
    "tfmq/deep/__init__.py": "DEEP = 1\n",
    "tfmq/deep/b.py": "def g():\n    from tfmq.d import D\n\n    return D\n",
    "tfmq/c.py": "from __future__ import annotations\n\nfrom typing import TYPE_CHECKING\n\n"
    "if TYPE_CHECKING:\n    from tfmq.types import T\nelse:\n    from tfmq.e import E\n",
    "tfmq/d.py": "from tfmq.a import f\n\nD = f\n",
    "tfmq/e.py": "E = 1\n",
    "tfmq/types.py": "T = int\n",
    "tfmq/other.py": "import tfmq.a\n",
}


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """The folder of a project whose modules import each other, in a circle too."""
    monkeypatch.setattr(module, "ROOT", tmp_path)
    forget()
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    yield tmp_path
    forget()


def forget() -> None:
    """Read files anew."""
    module._imported.cache_clear()
    module._code.cache_clear()


def changed(project: Path, name: str, old: str, new: str) -> bool:
    """Whether a change to a file changes the hash of `tfmq/a.py`."""
    path, entry = project / name, project / "tfmq/a.py"
    before, text = code_hash(entry), path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    forget()
    after = code_hash(entry)
    path.write_text(text)
    forget()
    return after != before


def test_imports_are_followed(project):
    """Into functions and packages; not those for type checkers, nor those of other projects."""
    names = ["__init__.py", "a.py", "c.py", "d.py", "deep/__init__.py", "deep/b.py", "e.py"]
    assert closure(project / "tfmq/a.py") == [project / "tfmq" / name for name in names]
    assert closure(project / "tfmq/e.py") == [project / "tfmq/e.py"]
    both = closure(project / "tfmq/types.py", project / "tfmq/other.py")
    assert {path.name for path in both} == {"other.py", "types.py", *(Path(name).name for name in names)}


def test_code_counts_wherever_it_is(project):
    assert changed(project, "tfmq/a.py", "return 1", "return 2")
    assert changed(project, "tfmq/d.py", "D = f", "D = 3")
    assert changed(project, "tfmq/deep/__init__.py", "DEEP = 1", "DEEP = 2")
    assert changed(project, "tfmq/e.py", "E = 1", "E = 2")
    assert changed(project, "tfmq/__init__.py", "", "X = 1")


def test_what_does_not_decide_does_not_count(project):
    assert not changed(project, "tfmq/a.py", '"""A."""', '"""Another text."""')
    assert not changed(project, "tfmq/a.py", '    """Doc."""\n', "")
    assert not changed(project, "tfmq/a.py", "    return 1", "    # a comment\n\n    return (1)")
    assert not changed(project, "tfmq/types.py", "T = int", "T = str")
    assert not changed(project, "tfmq/other.py", "import tfmq.a", "import tfmq.e")


def test_a_text_that_is_no_docstring_counts(project):
    assert changed(project, "tfmq/e.py", "E = 1", 'E = "one"')
    path = project / "tfmq/e.py"
    path.write_text('E = 1\n"""Not the first statement."""\n')
    forget()
    assert changed(project, "tfmq/e.py", "Not the first", "Still not the first")


def test_the_order_of_entries_does_not_matter(project):
    a, c = project / "tfmq/a.py", project / "tfmq/c.py"
    assert code_hash(a, c) == code_hash(c, a) != code_hash(c)


def test_a_pass_is_decided_by_what_it_imports():
    root = Path(__file__).parents[2]
    found = {path.relative_to(root).as_posix() for path in closure(root / "tfmq/passes/block_reconstruction.py")}
    assert {"tfmq/passes/reconstruction.py", "tfmq/network/offload.py", "tfmq/modules/layers.py"} < found
    assert not any(name.startswith(("baselines", "benchmarks", "tests")) for name in found)
    assert "tfmq/passes/step_sizes.py" not in found


def test_a_name_of_the_front_door_is_the_module_that_defines_it(project):
    (project / "tfmq/__init__.py").write_text('_HOMES = {"Deep": "deep.b"}\n')
    mine = project / "mine.py"
    mine.write_text("from tfmq import Deep\n")
    forget()
    assert project / "tfmq/deep/b.py" in closure(mine)


def test_modules_beside_a_file_of_one_s_own_count(project, tmp_path_factory):
    """Those outside the project, which an import finds from the folder of the file."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "method.py").write_text("import loss\nimport tfmq.e\n")
    (folder / "loss.py").write_text("WEIGHT = 1\n")
    before = code_hash(folder / "method.py")
    assert {path.name for path in closure(folder / "method.py")} == {"method.py", "loss.py", "__init__.py", "e.py"}
    (folder / "loss.py").write_text("WEIGHT = 20\n")
    assert code_hash(folder / "method.py") != before
