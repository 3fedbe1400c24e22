"""All that one does with this repository: `nox -l` lists the sessions, `nox -s NAME` runs one.

The sessions share one environment, `.nox/env`, since torch takes several GB. It is made once from constraints.txt and
again when pyproject.toml or constraints.txt change.
"""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nox

nox.options.sessions = ["lint", "tests", "results-fresh"]
nox.options.default_venv_backend = "none"
nox.needs_version = ">=2025.5"

ROOT = Path(__file__).parent
ENVIRONMENT = ROOT / ".nox" / "env"
BIN = ENVIRONMENT / "bin"
PYTHON = str(BIN / "python")
STAMP = ENVIRONMENT / "installed"
DEVICE = "TFMQ_BENCH_DEVICE"
INTERRUPTED = 130


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and format with ruff, and types with mypy."""
    install(session)
    session.run(PYTHON, "-m", "ruff", "check", external=True)
    session.run(PYTHON, "-m", "ruff", "format", "--check", external=True)
    session.run(PYTHON, "-m", "mypy", external=True)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests, in two processes; arguments after -- go to pytest."""
    install(session)
    shared = ["-n", "2", "--dist", "loadgroup"]
    session.run(PYTHON, "-m", "pytest", *shared, *session.posargs, env={"OMP_NUM_THREADS": "1"}, external=True)


@nox.session
def bench(session: nox.Session) -> None:
    """Reproduce every method at w4a8 on emoji-ldm4, in ten minutes, and compare with the committed results.

    `nox -s bench -- emoji-text` reproduces all cells of a task. Both work in a scratch folder and leave results/ as it
    is. `nox -s bench -- --all` is `dvc repro` with progress: what has changed since the last run is made again, and
    results/ is written. `--device cuda` runs on a GPU.
    """
    arguments = list(session.posargs)
    everything = "--all" in arguments
    if everything:
        arguments.remove("--all")
        if [name for name in arguments if not name.startswith("--device") and name not in ("cpu", "cuda", "auto")]:
            session.error("--all takes nothing but --device: `nox -s bench -- emoji-text` is for one task")
    install(session)
    pull(session, ROOT)
    if everything:
        call(session, "benchmarks.upkeep.everything", arguments, stage_environment([]))
    else:
        call(session, "benchmarks.upkeep.reproduce", arguments)


@nox.session
def reproduce(session: nox.Session) -> None:
    """Reproduce cells in a scratch folder and compare them with the committed results.

    `nox -s reproduce -- emoji-ldm4/tfmq/w4a8`: names of cells, rows or tasks, and patterns; `--random 5` draws cells;
    `--help` says the rest.
    """
    if not session.posargs:
        session.error("name cells, such as `nox -s reproduce -- emoji-ldm4/tfmq/w4a8`, or draw some: `-- --random 5`")
    install(session)
    pull(session, ROOT)
    call(session, "benchmarks.upkeep.reproduce", session.posargs)


@nox.session(name="bench-smoke")
def bench_smoke(session: nox.Session) -> None:
    """Run every stage, task and method in minutes, on a copy: the results in this folder stay as they are.

    The copy has the files that git knows or would add, cut-down settings, and no results. One row of each table runs
    as DVC's stages do, the others in one process, each method of a table on one of its tasks.
    `nox -s bench-smoke -- --device cuda` runs on a GPU.
    """
    install(session)
    environment = stage_environment(session.posargs)
    started = time.monotonic()
    copy = Path(session.create_tmp()).resolve() / "repository"
    shutil.rmtree(copy, ignore_errors=True)
    copy_repository(ROOT, copy)
    smoke = [PYTHON, "-m", "benchmarks.upkeep.smoke"]
    settings = (ROOT / "params.yaml").read_text(encoding="utf-8")
    cut = subprocess.run([*smoke, "params"], cwd=copy, input=settings, text=True, check=True, stdout=subprocess.PIPE)
    (copy / "params.yaml").write_text(cut.stdout, encoding="utf-8")
    with session.chdir(copy):
        pull(session, copy)
        targets = subprocess.run([*smoke, "targets"], cwd=copy, text=True, check=True, stdout=subprocess.PIPE)
        session.run(PYTHON, "-m", "dvc", "repro", *targets.stdout.split(), env=environment, external=True)
        session.run(*smoke, "rest", env=environment, external=True)
        session.run(PYTHON, "-m", "dvc", "repro", "--single-item", "tables", env=environment, external=True)
        session.run(*smoke, "check", external=True)
    shutil.rmtree(copy)
    session.log(f"smoke run took {time.monotonic() - started:.0f} s")


@nox.session(name="gpu-check")
def gpu_check(session: nox.Session) -> None:
    """Find out on one GPU, in eight minutes, what no CPU can tell; writes results/devices/NAME.json.

    What runs, whether executed integers are exact, how fast each arithmetic is, and what learning takes, on networks of
    full size with random weights. Nothing is downloaded. Where the environment is there already,
    `python -m benchmarks.upkeep.gpu_check` does the same. Without a GPU it says so, and fails.
    """
    install(session)
    call(session, "benchmarks.upkeep.gpu_check", session.posargs)


@nox.session(name="results-fresh")
def results_fresh(session: nox.Session) -> None:
    """Fail if committed results are older than the code or settings that make them, or were edited by hand."""
    install(session)
    pull(session, ROOT)
    session.run(PYTHON, "-m", "benchmarks.upkeep.freshness", external=True)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the pages of the library, API included, in docs/_build/html; a warning is an error."""
    install(session)
    source, pages = ROOT / "docs", ROOT / "docs" / "_build" / "html"
    session.run(PYTHON, "-m", "sphinx", "-W", "--keep-going", "-q", "-E", str(source), str(pages), external=True)
    session.log(f"open {pages / 'index.html'}")


def install(session: nox.Session) -> None:
    """Make the shared environment, unless it is there for these requirements."""
    requirements = fingerprint([ROOT / "pyproject.toml", ROOT / "constraints.txt"])
    if STAMP.exists() and STAMP.read_text(encoding="utf-8") == requirements:
        return
    session.run(sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT), external=True)
    extras = f"{ROOT}[bench,paper,small,deploy,dev,docs]"
    session.run(PYTHON, "-m", "pip", "install", "-q", "-c", "constraints.txt", "-e", extras, external=True)
    STAMP.write_text(requirements, encoding="utf-8")


def call(session: nox.Session, module: str, arguments: list[str], environment: dict[str, str] | None = None) -> None:
    """Run a module that says itself how it ends, also where it is stopped with Ctrl-C."""
    process = subprocess.Popen([PYTHON, "-m", module, *arguments], cwd=ROOT, env=os.environ | (environment or {}))
    before = signal.signal(signal.SIGINT, lambda signum, frame: None)  # reaches the process too, which ends at once
    try:
        code = process.wait()
    finally:
        signal.signal(signal.SIGINT, before)
    if code in (INTERRUPTED, -signal.SIGINT):
        sys.exit(INTERRUPTED)
    if code:
        session.error("see above")


def fingerprint(paths: list[Path]) -> str:
    """One hash over the contents of files."""
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in paths)).hexdigest()


def pull(session: nox.Session, root: Path) -> None:
    """Fetch data/ from the embedded remote; with the cache that is nothing to do."""
    if (root / "data.dvc").exists():
        session.run(PYTHON, "-m", "dvc", "pull", "-q", "data.dvc", external=True)


def stage_environment(arguments: list[str]) -> dict[str, str]:
    """Variables for `dvc repro`: its stages run `python`, on the device of `--device NAME` where that is given.

    Raises ValueError for any other arguments.
    """
    path = {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    if not arguments:
        return path
    if len(arguments) != 2 or arguments[0] != "--device":
        raise ValueError(f"unknown arguments {' '.join(arguments)!r}: give --device cpu or --device cuda")
    return path | {DEVICE: arguments[1]}


def copy_repository(root: Path, target: Path) -> None:
    """Copy the files that git knows or would add, as they are now, without results; DVC there needs no git."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=root, check=True, stdout=subprocess.PIPE, text=True).stdout.split("\0")
    for name in sorted({name for name in names if name}):
        if not (root / name).is_file() or name == "dvc.lock" or name.startswith("results/"):
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, target / name)
    (target / ".dvc").mkdir(exist_ok=True)
    (target / ".dvc" / "config.local").write_text("[core]\n    no_scm = true\n", encoding="utf-8")
