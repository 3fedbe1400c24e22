"""Where to compute, and how, so that results can be compared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from benchmarks.suite import discover

DEVICES = ("auto", "cpu", "cuda")


def device_of(name: str) -> torch.device:
    """The device to compute on: ``cpu``, ``cuda``, or ``auto`` for CUDA where there is one.

    CUDA computes in float32, without TF32 outside `tf32`, and with deterministic convolutions, so that results can be
    compared. Raises ValueError for another name, or if CUDA is asked for and there is none.
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


def has_tf32(device: torch.device) -> bool:
    """Whether a device has TF32, as NVIDIA's GPUs do since Ampere."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """On CUDA, convolutions and matrix products inside take TF32 if ``allowed``, and else float32."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
