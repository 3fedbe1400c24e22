"""What a wheel holds: the library and the methods, and nothing else at the top level."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("tfmq", "baselines")
# What a checkout has besides, as far as a build could take it by accident.
BESIDES = ("benchmarks", "tests", "docs", "examples")
SEEN = """
from importlib.util import find_spec
from pathlib import Path
import tfmq, tfmq.closure
folder = Path(find_spec("baselines").origin).parent
print(tfmq.__file__, folder, tfmq.Precision.parse("w4a8"), (folder / "reported.csv").is_file(), sep="\\n")
print(*(path.relative_to(tfmq.closure.ROOT) for path in tfmq.closure.closure(folder / "tfmq.py")), sep="\\n")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of this checkout, built without a network."""
    if find_spec("setuptools") is None or find_spec("pip") is None:
        pytest.skip("setuptools and pip build the wheel, and one of them is missing here")
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE", "noxfile.py"):
        shutil.copy(ROOT / name, copy)
    for name in (*PACKAGES, *BESIDES):
        shutil.copytree(
            ROOT / name, copy / name, ignore=lambda folder, names: {n for n in names if not _is_code(Path(folder, n))}
        )
    built = copy / "built"
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "-w", built, copy], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = built.glob("*.whl")
    return found


def _is_code(path: Path) -> bool:
    return path.suffix in (".py", ".csv") or (path.is_dir() and path.name != "__pycache__")


def test_the_top_level_holds_the_library_and_the_methods(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert {name.split("/")[0] for name in names} == {*PACKAGES, f"tfmq_bench-{version}.dist-info"}


def test_every_file_of_the_packages_is_there(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    files = {path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.suffix in (".py", ".csv")}
    assert {path.relative_to(ROOT).as_posix() for path in files} <= names
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_it_works_without_the_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n{SEEN}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    module, folder, precision, reported, *code = done.stdout.splitlines()
    assert Path(module).parent == tmp_path / "site" / "tfmq" and Path(folder) == tmp_path / "site" / "baselines"
    assert precision == "w4a8" and reported == "True"
    assert {"baselines/tfmq.py", "baselines/_brecq.py", "tfmq/passes/block_reconstruction.py"} <= set(code)


def test_the_changelog_has_this_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert f"\n## {version}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_hooks_have_the_pinned_ruff():
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    pinned = re.search(r"^ruff==\S+$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"ruff==[\d.]+", hooks)) == {pinned.group()}
