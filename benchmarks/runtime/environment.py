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
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    """Output of a git command, empty where git or a repository is missing."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
