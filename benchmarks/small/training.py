"""What all trainings share: the loop, learning rate, batches, weight averages, checkpoints and the log."""

import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class TrainingConfig:
    """How long and how fast; `save_every` iterations, a multiple of `log_every`, there is a checkpoint."""

    iterations: int
    batch: int
    peak_rate: float
    warm_up: int
    average_decay: float
    log_every: int
    save_every: int
    seed: int

    def __post_init__(self) -> None:
        if self.save_every % self.log_every:
            raise ValueError(f"save_every is {self.save_every}: it must be a multiple of log_every, {self.log_every}.")


def train(
    config: TrainingConfig,
    model: nn.Module,
    losses: Callable[[int], dict[str, Tensor]],
    folder: Path,
    log_path: Path,
    export: Callable[[nn.Module], dict[str, float]],
) -> nn.Module:
    """Train `model`, or go on where `folder`/checkpoint.pt stopped; return an exponential average of its weights.

    `losses` maps an iteration to scalars: `loss` is minimised, and the log holds the means of all since its last line,
    since the loss of one batch is mostly chance. `export` receives the average before the first iteration, with each
    checkpoint and at the end; what it returns is logged too. Raises ValueError if the checkpoint was written under
    other settings, FloatingPointError if the loss is not finite.
    """
    average = copy.deepcopy(model).requires_grad_(False)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=0.0)
    start, seconds = 0, 0.0
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        state = load_checkpoint(checkpoint)
        if state["config"] != asdict(config):
            raise ValueError(f"{checkpoint} was written under other settings; remove it to start anew.")
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        start, seconds = state["iteration"], state["seconds"]
    start_log(log_path, start)
    export(average)
    began = time.perf_counter() - seconds
    terms: list[dict[str, float]] = []
    for iteration in range(start, config.iterations):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(iteration, config.iterations, config.warm_up, config.peak_rate)
        found = losses(iteration)
        if not torch.isfinite(found["loss"]):
            raise FloatingPointError(f"The loss is {found['loss'].item()} at iteration {iteration}.")
        optimizer.zero_grad()
        found["loss"].backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        update_average(average, model, iteration, config.average_decay)
        terms.append({name: term.item() for name, term in found.items()})
        done = iteration + 1
        if done % config.log_every and done != config.iterations:
            continue
        seconds = time.perf_counter() - began
        entry = {name: sum(term[name] for term in terms) / len(terms) for name in found}
        entry = {"iteration": done, "seconds": seconds} | entry
        terms.clear()
        if done % config.save_every == 0 or done == config.iterations:
            state = {
                "config": asdict(config),
                "iteration": done,
                "seconds": seconds,
                "model": model.state_dict(),
                "average": average.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            save_checkpoint(checkpoint, state)
            entry |= export(average)
        log(log_path, entry)
    return average


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
    """Drop the lines of a log that a resumed run will write again, and a last one that was half-written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    kept = [line for line in lines if json.loads(line)["iteration"] <= iteration] if iteration else []
    path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def log(path: Path, entry: dict[str, float]) -> None:
    """Append one line of JSON, and show it."""
    line = json.dumps({name: round(value, 6) for name, value in entry.items()})
    print(line, flush=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
