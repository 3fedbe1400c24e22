import json
import socket
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks.runtime import environment


def test_an_environment_is_plain_and_names_versions():
    found = environment.describe()
    assert json.loads(json.dumps(found)) == found
    assert found["versions"]["torch"] == torch.__version__.split("+")[0]
    assert found["threads"] == torch.get_num_threads()
    assert found["cpu"]
    assert found["instructions"] == torch.backends.cpu.get_cpu_capability()
    assert found["gpu"] is None


def test_it_says_nothing_about_whose_machine_this_is():
    text = json.dumps(environment.describe())
    assert socket.gethostname() not in text
    assert str(Path.cwd()) not in text


def test_processors_of_one_name_are_told_apart(tmp_path, monkeypatch):
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n\nprocessor\t: 1\n")
    monkeypatch.setattr(environment, "CPUINFO", info)
    assert environment.machine()["cpu"] == "AMD EPYC, family 25 model 17"
    info.write_text("processor\t: 0\nmodel name\t: ARMv8 (v8l)\n")
    assert environment.machine()["cpu"] == "ARMv8 (v8l)"
    info.unlink()
    assert environment.machine()["cpu"]


def test_outside_a_repository_the_commit_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    found = environment.describe()
    assert found["commit"] is None
    assert found["modified"] is False


def test_edited_code_is_seen_from_any_folder(tmp_path, monkeypatch):
    root, elsewhere = tmp_path / "root", tmp_path / "root" / "benchmarks" / "paper"
    elsewhere.mkdir(parents=True)
    (root / "tfmq").mkdir()
    (root / "tfmq" / "code.py").write_text("a = 1\n")
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@localhost"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], cwd=root, check=True)
    monkeypatch.setattr(environment, "ROOT", root)
    monkeypatch.chdir(elsewhere)
    assert environment.describe()["modified"] is False
    (root / "tfmq" / "code.py").write_text("a = 2\n")
    assert environment.describe()["modified"] is True


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_named():
    assert environment.describe("cuda")["gpu"] == torch.cuda.get_device_name()
