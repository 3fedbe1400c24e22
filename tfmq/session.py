"""The state of a running quantisation: what passes work on, what they have spent, and how their results are kept."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
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
from tfmq.network.rows import CalibrationRows
from tfmq.passes import Cost, Pass
from tfmq.plan import Protocol, QuantizationPlan
from tfmq.precision import Precision
from tfmq.state import Coverage, coverage
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
        details: what passes tell of their own choices, as JSON can hold it.
        network: that was quantised, once it is.
    """

    passes: list[Spent] = field(default_factory=list)
    details: dict[str, object] = field(default_factory=dict)
    network: Network | None = field(default=None, repr=False)

    @property
    def coverage(self) -> list[Coverage]:
        """How every layer of the network is treated at this moment; see `tfmq.state.coverage`."""
        return [] if self.network is None else coverage(self.network)

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
    """What passes work on, and what they have spent so far.

    Attributes:
        network: the network, with quantised layers in place that become quantised pass by pass.
        full: the full-precision network.
        backbone: of both.
        plan: how each layer is treated.
        precision, protocol: as asked for.
        pool: what calibration rows are drawn from.
        generator: the only source of randomness.
        workspace: keeps what is learned.
        report: what was spent so far, and what passes tell of their choices.
    """

    network: Network
    full: Network
    backbone: Backbone
    plan: QuantizationPlan
    precision: Precision
    protocol: Protocol
    pool: CalibrationSet
    generator: torch.Generator
    workspace: Workspace = field(default_factory=Workspace)
    report: QuantizationReport = field(default_factory=QuantizationReport)
    _begun: list[tuple[Pass, CalibrationRows | None]] = field(default_factory=list)
    _rows_hashes: list[str | None] = field(default_factory=list)
    _units: int = 0

    @property
    def finite_set(self) -> Tensor:
        """The distinct time steps of the schedule, (S,), ascending, on the CPU."""
        return self.pool.timesteps.unique().cpu()

    @contextmanager
    def running(self, step: Pass, rows: CalibrationRows | None = None) -> Iterator[None]:
        """Count what is spent inside as that of ``step``, which works on ``rows``."""
        self._begun.append((step, rows))
        self._rows_hashes.append(None)
        self._units = 0
        self.report.passes.append(Spent(step.name))
        start = time.perf_counter()
        yield
        self.report.passes[-1].seconds += time.perf_counter() - start

    def count_evaluations(self, samples: int) -> None:
        """Add to the sample evaluations of the network that the present pass has spent."""
        self.report.passes[-1].unet_evaluations += samples

    def count_steps(self, steps: int) -> None:
        """Add to the optimiser steps that the present pass has spent; ``learn`` does so by itself."""
        self.report.passes[-1].optimizer_steps += steps

    def learn(
        self,
        unit: str,
        learn: Callable[[], list[float]],
        learned: Callable[[], dict[str, Tensor]],
        restore: Callable[[dict[str, Tensor]], None],
    ) -> None:
        """Run one unit of learning, or load its saved result and set the generator to the state after it.

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
        steps = [step for step, _ in self._begun]
        seen = any(step.sees_activations for step in steps)
        decided = [
            unit,
            self._units,
            self._given,
            self.plan.described(activations=seen),
            _decided([self.precision, self.protocol]) if seen else None,
            [_decided(step) for step in steps],
            [self._rows_hash(index) for index in range(len(steps))],
            code_hash(*_files(steps)),
            hashlib.sha256(self.generator.get_state().numpy().data).hexdigest(),
        ]
        return hashlib.sha256(json.dumps(decided, sort_keys=True, default=str).encode()).hexdigest()

    def _rows_hash(self, index: int) -> str:
        """The hash of the rows that a pass works on."""
        rows = self._begun[index][1]
        if rows is None:
            return ""
        found = self._rows_hashes[index]
        if found is None:
            found = _tensors_hash(rows.tensors.items())
            self._rows_hashes[index] = found
        return found

    @cached_property
    def _given(self) -> list[str]:
        """Network, pool, versions and device."""
        device = self.network.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        network = _tensors_hash(self.full.state_dict().items())
        pool = _tensors_hash(self.pool.tensors.items())
        config = {name: value for name, value in self.full.config.items() if not name.startswith("_")}
        settings = [type(self.full).__name__, json.dumps(config, sort_keys=True, default=str), str(self.pool.settings)]
        return [network, pool, *settings, torch.__version__, diffusers.__version__, name]


def _decided(setting: object) -> object:
    """A setting as JSON, for its hash: of a dataclass, the fields that count in a comparison."""
    if dataclasses.is_dataclass(setting):
        fields = {f.name: _decided(getattr(setting, f.name)) for f in dataclasses.fields(setting) if f.compare}
        return [type(setting).__qualname__, fields]
    if isinstance(setting, tuple | list):
        return [_decided(item) for item in setting]
    if isinstance(setting, Mapping):
        return [[_decided(key), _decided(value)] for key, value in setting.items()]
    if isinstance(setting, Tensor):
        return _tensors_hash([("", setting)])
    if setting is None or isinstance(setting, bool | int | float | str | torch.dtype | torch.device):
        return repr(setting)
    name = getattr(setting, "__qualname__", None)  # of a function; what it draws counts by itself
    if name is None:
        raise ValueError(
            f"a pass has the setting {setting!r}, of a type whose values can not be told apart: make it a dataclass, "
            "or quantise without a workspace"
        )
    return [getattr(setting, "__module__", ""), name]


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
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
