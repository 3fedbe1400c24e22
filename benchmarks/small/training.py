"""What both trainings share: learning rate, batches, weight averages, checkpoints and the log."""

import json
import math
from pathlib import Path

import torch
from torch import Tensor, nn


def learning_rate(iteration: int, iterations: int, warm_up: int, peak: float) -> float:
    """A linear warm-up, then half a cosine down to a hundredth of the peak."""
    if iteration < warm_up:
        return peak * (iteration + 1) / warm_up
    progress = (iteration - warm_up) / max(1, iterations - warm_up)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def batch_indices(iteration: int, batch: int, count: int, seed: int) -> Tensor:
    """Which images an iteration sees: a new order each epoch, from the seed and the iteration alone.

    A resumed run therefore needs no state of a generator.
    """
    per_epoch = count // batch
    order = torch.randperm(count, generator=generator(seed, iteration // per_epoch))
    start = iteration % per_epoch * batch
    return order[start : start + batch]


def generator(seed: int, step: int) -> torch.Generator:
    """A generator that depends on nothing but the seed and a counter."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, iteration: int, decay: float) -> None:
    """Move an exponential average of the weights towards the model's; early on it forgets faster."""
    rate = 1 - min(decay, (1 + iteration) / (10 + iteration))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), rate)


def save_checkpoint(path: Path, state: dict[str, object]) -> None:
    """Write tensors and plain numbers under a temporary name, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    torch.save(state, unfinished)
    unfinished.replace(path)


def load_checkpoint(path: Path) -> dict[str, object]:
    """Read what `save_checkpoint` wrote, without unpickling code."""
    return torch.load(path, map_location="cpu", weights_only=True)


def start_log(path: Path, iteration: int) -> None:
    """Drop the lines of a log that a resumed run will write again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [line for line in lines if json.loads(line)["iteration"] <= iteration] if iteration else []
    path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def log(path: Path, entry: dict[str, float]) -> None:
    """Append one line of JSON, and show it."""
    line = json.dumps({name: round(value, 6) for name, value in entry.items()})
    print(line, flush=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
