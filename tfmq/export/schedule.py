"""The time steps of a scheduler that lies in a folder."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers


def timesteps_of(folder: Path, steps: int) -> list[int]:
    """The distinct time steps, ascending, that a scheduler of diffusers takes in so many denoising steps.

    Raises ValueError where ``folder`` holds none, or one of a class that diffusers does not have.
    """
    path = folder / "scheduler_config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no scheduler: there is no {path.name} in it")
    name = json.loads(path.read_text(encoding="utf-8")).get("_class_name", "")
    kind = getattr(diffusers, name, None)
    if kind is None or not hasattr(kind, "from_pretrained"):
        raise ValueError(f"{path} is of a {name or 'nameless class'}, which diffusers does not have")
    scheduler = kind.from_pretrained(folder)
    scheduler.set_timesteps(steps)
    return sorted({int(step) for step in scheduler.timesteps})
