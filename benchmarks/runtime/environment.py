"""What a number was made with: versions, processor, threads and commit. No host names, users or paths."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

PACKAGES = ("torch", "torchvision", "diffusers", "numpy", "safetensors", "pillow", "torch-fidelity")
# The repository, wherever the process works: a suite's folder, or a scratch folder.
ROOT = Path(__file__).parents[2]
CPUINFO = Path("/proc/cpuinfo")
CODE = ("tfmq", "baselines", "benchmarks", "params.yaml", "dvc.yaml")


def describe(device: torch.device | str = "cpu") -> dict[str, object]:
    """The environment of a run on ``device``, as plain values for a Record.

    ``commit`` is None outside a git repository; ``modified`` says whether code or settings differed from that commit.
    """
    return machine(device) | {
        "commit": _git("rev-parse", "HEAD") or None,
        "modified": bool(_git("status", "--porcelain", "--", *CODE)),
    }


def machine(device: torch.device | str = "cpu") -> dict[str, object]:
    """What `describe` says besides the commit."""
    cuda = torch.device(device).type == "cuda"
    return {
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES},
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name(device) if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "threads": torch.get_num_threads(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    """The processor's name and generation: a virtual machine may have a name that many generations share."""
    lines = CPUINFO.read_text(encoding="utf-8").splitlines() if CPUINFO.exists() else []
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if "model name" not in found:
        return platform.processor() or platform.machine()
    if "cpu family" not in found:
        return found["model name"]
    return f"{found['model name']}, family {found['cpu family']} model {found.get('model', '?')}"


def _git(*arguments: str) -> str:
    """Output of a git command, empty where git or a repository is missing."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
