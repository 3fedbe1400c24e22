"""Where to compute, and how, so that results can be compared."""

from __future__ import annotations

import torch

from benchmarks.suite import discover

DEVICES = ("auto", "cpu", "cuda")


def device_of(name: str) -> torch.device:
    """The device to compute on: ``cpu``, ``cuda``, or ``auto`` for CUDA where there is one.

    CUDA computes in float32 without TF32, and with deterministic convolutions, so that results can be compared.
    Raises ValueError for another name, or if CUDA is asked for and there is none.
    """
    if name not in DEVICES:
        raise discover.unknown("device", name, DEVICES, "Choose one of them.")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but torch sees no GPU: use --device cpu")
    if name == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.deterministic = True
    return torch.device(name)
