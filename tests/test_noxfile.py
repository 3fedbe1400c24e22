import subprocess

import pytest

import noxfile


def test_a_copy_has_what_git_knows_or_would_add_but_no_results(tmp_path):
    root, copy = tmp_path / "root", tmp_path / "copy"
    files = (".gitignore", "code/a.py", "new.py", "gone.py", "dvc.lock", "results/README.md", "data/x", ".dvc/config")
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("/data\n" if name == ".gitignore" else name)
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    subprocess.run(["git", "add", "code", "gone.py", "dvc.lock", "results", ".dvc"], cwd=root, check=True)
    (root / "gone.py").unlink()
    noxfile.copy_repository(root, copy)
    found = {path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()}
    assert found == {".gitignore", "code/a.py", "new.py", ".dvc/config", ".dvc/config.local"}


def test_the_environment_depends_on_the_contents_of_requirements(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_text("torch")
    second.write_text("torch==2.15.0")
    before = noxfile.fingerprint([first, second])
    assert before == noxfile.fingerprint([first, second])
    second.write_text("torch==2.14.0")
    assert before != noxfile.fingerprint([first, second])


def test_stages_run_on_the_device_that_was_asked_for():
    assert noxfile.stage_environment(["--device", "cuda"])[noxfile.DEVICE] == "cuda"
    assert noxfile.DEVICE not in noxfile.stage_environment([])
    assert noxfile.stage_environment([])["PATH"].startswith(str(noxfile.BIN))
    with pytest.raises(ValueError, match="unknown arguments '--gpu': give --device"):
        noxfile.stage_environment(["--gpu"])
