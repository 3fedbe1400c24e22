"""One quantisation on its way: what its passes work on, what they have spent, and how what they learn is kept."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import diffusers
import torch
from torch import Tensor

from tfmq.closure import code_hash
from tfmq.network.backbone import Backbone, Network
from tfmq.network.calibration import CalibrationSet
from tfmq.passes import Cost, Pass
from tfmq.plan import Coverage, Protocol, QuantizationPlan
from tfmq.precision import Precision
from tfmq.workspace import Workspace

GENERATOR, SECONDS, STEPS = "generator", "seconds", "optimizer_steps"


@dataclass
class Spent:
    """What a pass has spent. Learning that was found in a workspace counts, as if it had been done here.

    Attributes:
        name: of the pass.
        seconds: wall time.
        unet_evaluations, optimizer_steps: as in `tfmq.passes.Cost`.
    """

    name: str
    seconds: float = 0.0
    unet_evaluations: int = 0
    optimizer_steps: int = 0


@dataclass
class QuantizationReport:
    """What a quantisation did.

    Attributes:
        passes: what each has spent, in order.
        coverage: how every layer is treated.
        details: what passes tell of their own choices, as JSON can hold it.
    """

    passes: list[Spent] = field(default_factory=list)
    coverage: list[Coverage] = field(default_factory=list)
    details: dict[str, object] = field(default_factory=dict)

    @property
    def seconds(self) -> dict[str, float]:
        """Wall time by name of pass."""
        found: dict[str, float] = {}
        for spent in self.passes:
            found[spent.name] = found.get(spent.name, 0.0) + spent.seconds
        return found

    @property
    def cost(self) -> Cost:
        """What all passes have spent together; the rows that were learned on are not counted."""
        return Cost(
            sum(spent.unet_evaluations for spent in self.passes), sum(spent.optimizer_steps for spent in self.passes)
        )


@dataclass
class Session:
    """What passes work on.

    Attributes:
        unet: the network, with quantised layers in place that become quantised pass by pass.
        full: the full-precision network.
        backbone: of both.
        plan: how each layer is treated.
        precision, protocol: as asked for.
        pool: what calibration rows are drawn from.
        generator: the only source of randomness.
        workspace: keeps what is learned.
        report: what was spent so far.
    """

    unet: Network
    full: Network
    backbone: Backbone
    plan: QuantizationPlan
    precision: Precision
    protocol: Protocol
    pool: CalibrationSet
    generator: torch.Generator
    workspace: Workspace = field(default_factory=Workspace)
    report: QuantizationReport = field(default_factory=QuantizationReport)
    _begun: list[Pass] = field(default_factory=list)
    _units: int = 0

    @property
    def finite_set(self) -> Tensor:
        """The distinct time steps of the schedule, int64 (S,), ascending, on the CPU."""
        return self.pool.timesteps.unique().cpu()

    @contextmanager
    def running(self, step: Pass) -> Iterator[None]:
        """Count what is spent inside as that of ``step``."""
        self._begun.append(step)
        self._units = 0
        self.report.passes.append(Spent(step.name))
        start = time.perf_counter()
        yield
        self.report.passes[-1].seconds += time.perf_counter() - start

    def count_evaluations(self, samples: int) -> None:
        """Note so many sample evaluations of the network."""
        self.report.passes[-1].unet_evaluations += samples

    def count_steps(self, steps: int) -> None:
        """Note so many optimiser steps; ``learn`` does it by itself."""
        self.report.passes[-1].optimizer_steps += steps

    def learn(
        self,
        unit: str,
        learn: Callable[[], list[float]],
        learned: Callable[[], dict[str, Tensor]],
        restore: Callable[[dict[str, Tensor]], None],
    ) -> None:
        """Learn what is learned together, or take it from the workspace: the generator then goes on as after learning.

        Args:
            unit: what it is, such as the path of a block.
            learn: does it, one loss for each optimiser step.
            learned: what it ends with.
            restore: takes that instead of learning.
        """
        spent, workspace = self.report.passes[-1], self.workspace
        address = self.address(unit) if workspace.keeps else ""
        self._units += 1
        kept = workspace.get(address)
        if kept is not None:
            kept = dict(kept)
            self.generator.set_state(kept.pop(GENERATOR))
            spent.seconds += kept.pop(SECONDS).item()
            spent.optimizer_steps += int(kept.pop(STEPS))
            restore(kept)
            return
        start = time.perf_counter()
        steps = len(learn())
        spent.optimizer_steps += steps
        if workspace.keeps:
            tensors = {part: tensor.detach().cpu() for part, tensor in learned().items()}
            tensors[GENERATOR] = self.generator.get_state()
            tensors[SECONDS] = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
            workspace.put(address, tensors | {STEPS: torch.tensor(steps)})

    def address(self, unit: str) -> str:
        """The hash of all that decides what a unit of the present pass learns."""
        seen = any(step.sees_activations for step in self._begun)
        decided = [
            unit,
            self._units,
            self._given,
            self.plan.described(activations=seen),
            [[type(step).__qualname__, _settings(step)] for step in self._begun],
            code_hash(*_files(self._begun)),
            hashlib.sha256(self.generator.get_state().numpy()).hexdigest(),
        ]
        return hashlib.sha256(json.dumps(decided, sort_keys=True, default=str).encode()).hexdigest()

    @cached_property
    def _given(self) -> list[str]:
        """Network, pool, versions and device."""
        device = self.unet.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        network = _tensors_hash(self.full.state_dict().items())
        pool = _tensors_hash(self.pool.tensors.items())
        settings = [self.full.to_json_string(), str(self.pool.settings)]
        return [network, pool, *settings, torch.__version__, diffusers.__version__, name]


def _settings(step: Pass) -> dict[str, object]:
    """The settings of a pass that decide its result."""
    return {f.name: repr(getattr(step, f.name)) for f in dataclasses.fields(step) if f.compare}


def _files(steps: Iterable[Pass]) -> list[Path]:
    """The files that define some passes. Raises ValueError for a pass without one."""
    try:
        return sorted({Path(inspect.getfile(type(step))) for step in steps})
    except (OSError, TypeError):
        raise ValueError(
            "a pass that is defined at a prompt has no file whose code could be compared: write it to a file, or "
            "quantise without a workspace"
        ) from None


def _tensors_hash(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of names, types, shapes and bytes."""
    found = hashlib.sha256()
    for name, tensor in tensors:
        found.update(json.dumps([name, str(tensor.dtype), tensor.shape]).encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()
