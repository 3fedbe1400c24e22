"""Activation quantisers: observe a range, then freeze it; one for all time steps, or a table with one for each."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from tfmq.modules.number_types import KeepsTypes
from tfmq.numerics.affine import Grid, fake_quantize
from tfmq.numerics.finite import all_finite
from tfmq.numerics.observer import RangeObserver, SearchObserver, ThresholdObserver
from tfmq.numerics.steps import exact_steps, step_value

ActivationRange = Literal["minmax", "search", "thresholds", "by_bits"]
# Below so many bits, clipping what is rare gains more than it costs.
FEW_BITS = 6


class StepTracker:
    """Tells the quantisers of a network which of the finite set of time steps is being evaluated.

    A forward pre-hook on the network (``watch``) feeds it, so that the network works inside any pipeline. Steps are
    looked up by value, never counted: a stock scheduler may repeat or skip steps.

    The current step is that of the thread which asks, so that threads may share one network. A thread that was told
    none, such as those of a backward pass on a GPU, gets the one that was told last.

    Attributes:
        steps: (S,), the finite set, in ascending order, int64, or float32 where some are fractional; empty where no
            quantiser has a table.
    """

    def __init__(self) -> None:
        self.steps = torch.empty(0, dtype=torch.int64)
        self._own = threading.local()
        self._last_index: int | Tensor = 0
        self._last: int | float | None = None

    @property
    def index(self) -> int | Tensor:
        """Position of the current step in ``steps``: an int, or (B,) where the rows of a batch differ."""
        return getattr(self._own, "index", self._last_index)

    @index.setter
    def index(self, index: int | Tensor) -> None:
        self._own.index = self._last_index = index

    @property
    def current(self) -> int | float | None:
        """The (first) current time step."""
        return getattr(self._own, "current", self._last)

    @current.setter
    def current(self, current: int | float | None) -> None:
        self._own.current = self._last = current

    def __getstate__(self) -> dict[str, object]:
        # What belongs to threads cannot be copied; the copy begins with the step of the thread that makes it.
        return {"steps": self.steps, "index": self.index, "current": self.current}

    def __setstate__(self, state: dict[str, object]) -> None:
        self._own = threading.local()
        for name, value in state.items():
            setattr(self, name, value)

    def watch(self, network: nn.Module) -> None:
        network.register_forward_pre_hook(self._before_forward, with_kwargs=True)

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.set(kwargs["timestep"] if "timestep" in kwargs else args[1])

    def set(self, timestep: Tensor | int | float) -> None:
        """Look up a time step, or one for each row. Raises ValueError for a step outside the finite set."""
        values = exact_steps(timestep).reshape(-1)
        self.current = step_value(values[0])
        if not len(self.steps):
            return
        common = torch.promote_types(self.steps.dtype, values.dtype)
        steps, values = self.steps.to(common), values.to(common).contiguous()
        index = torch.searchsorted(steps, values).clamp_max(len(steps) - 1)
        unknown = values[steps[index] != values]
        if len(unknown):
            raise ValueError(
                f"no activation range for time step {step_value(unknown[0])}: this network was calibrated for the "
                f"{len(self.steps)} steps {self.steps.tolist()}; sample with that schedule, or calibrate for yours"
            )
        self.index = int(index[0]) if (index == index[0]).all() else index

    @contextmanager
    def at(self, index: int | Tensor) -> Iterator[None]:
        """Let what this thread evaluates inside be at ``index``, such as that of some rows of the batch."""
        before = getattr(self._own, "index", None)
        self._own.index = index
        try:
            yield
        finally:
            if before is None:
                del self._own.index
            else:
                self._own.index = before

    def where(self) -> str:
        """The current time step, for error messages."""
        return "" if self.current is None else f" at time step {self.current}"


class FakeQuantize(KeepsTypes):
    """Quantise-dequantise one activation tensor per tensor and, where it has a table, per time step.

    Lifecycle: ``observe()`` starts recording (the input passes unchanged), ``freeze()`` turns the recorded range into
    ``scale`` and ``zero_point``, and from then on ``forward`` quantises. ``enabled = False`` lets the input pass.
    ``mix_bits`` gives it a width of its own at each time step.

    Args:
        bits: width of the codes.
        tracker: the network's step tracker.
        symmetric: signed grid with zero point 0 instead of an affine one.
        positive: for inputs in [0, inf): the range and the zero point start at 0 (softmax output).

    Attributes:
        path: where it stands in the network, for error messages.

    Buffers:
        scale, zero_point: float32, (1,) or (S,) with one entry for each of ``tracker.steps``; the input is quantised in
            this type, whatever its own, and comes out in its own.
        step_bits: uint8 (S,), the width of the codes at each of them, or None where it is ``bits`` at all.
    """

    scale: Tensor
    zero_point: Tensor
    step_bits: Tensor | None

    def __init__(self, bits: int, tracker: StepTracker, symmetric: bool = False, positive: bool = False) -> None:
        super().__init__()
        self.bits = bits
        self.tracker = tracker
        self.symmetric = symmetric
        self.positive = positive
        self.path = "activation"
        self.enabled = False
        self.observer: RangeObserver | None = None
        self.register_buffer("scale", torch.ones(1, dtype=torch.float32))
        self.register_buffer("zero_point", torch.zeros(1, dtype=torch.float32))
        self.register_buffer("step_bits", None)

    @property
    def grid(self) -> Grid:
        return Grid.signed(self.bits) if self.symmetric else Grid.unsigned(self.bits)

    @property
    def per_step(self) -> bool:
        return len(self.scale) > 1

    @property
    def active(self) -> bool:
        """Whether it quantises its input, records it, or a hook looks at it: whether it has to be called."""
        return self.enabled or self.observer is not None or bool(self._forward_pre_hooks)

    def observe(
        self, momentum: float | None = None, per_step: bool = False, activation_range: ActivationRange = "minmax"
    ) -> None:
        """Start recording.

        Args:
            momentum: as in ``RangeObserver``.
            per_step: keep one range a time step.
            activation_range: ``minmax``: the extremes of each batch. ``search``: the best of 80 ranges on each batch.
                ``thresholds``: the best of PTQ4DM's 100 on each batch, which passes quantised with the range so far,
                where with the others it passes unchanged. ``by_bits``: ``search`` below 6 bits; else ``minmax``, and
                the widest range.
        """
        if activation_range == "by_bits":
            activation_range, momentum = ("search", momentum) if self.bits < FEW_BITS else ("minmax", None)
        steps = len(self.tracker.steps) if per_step else 0
        if activation_range == "minmax":
            self.observer = RangeObserver(momentum, steps)
        elif activation_range == "search":
            self.observer = SearchObserver(self.bits, self.symmetric, self.positive, momentum, steps)
        else:
            self.observer = ThresholdObserver(self.bits, momentum, steps, self.symmetric)

    def freeze(self) -> None:
        """Set scale and zero point from what was recorded, and quantise from now on.

        Raises ValueError for data that was never seen, or constant: such a range is empty or meaningless.
        """
        observer, self.observer = self.observer, None
        if observer is None:
            raise ValueError(f"{self.path} was frozen before it observed anything")
        if not self.positive and observer.low.min() == observer.high.max():
            raise ValueError(
                f"the activation at {self.path} is constant ({observer.low.min().item():g}) over the calibration set "
                "and has no range to quantise: is a layer before it dead, or the calibration set too small?"
            )
        if torch.isnan(observer.low).any():
            raise ValueError(f"the activation at {self.path} was not seen at every time step of the finite set")
        scale, zero_point = observer.affine(self.bits, self.symmetric, self.positive)
        self.scale = scale.to(self.scale.device)
        self.zero_point = zero_point.to(self.zero_point.device)
        self.step_bits = None
        self.enabled = True

    def mix_bits(self, step_bits: Tensor, scale: Tensor, zero_point: Tensor) -> None:
        """Quantise with these widths, scales and zero points, (S,) each, one for each of ``tracker.steps``.

        Raises ValueError for a symmetric quantiser, whose grid depends on the width at both ends.
        """
        if self.symmetric:
            raise ValueError(f"{self.path} is symmetric: widths that vary over time steps need codes from 0 on")
        device = self.scale.device
        self.step_bits = step_bits.to(device, torch.uint8)
        self.scale, self.zero_point = scale.to(device), zero_point.to(device)
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        if self.observer is not None:
            self._record(self.observer, x)
            if not isinstance(self.observer, ThresholdObserver):
                return x
            scale, zero_point = self.observer.affine(self.bits, self.symmetric, self.positive)
            return self._quantize(x, scale.to(x.device), zero_point.to(x.device))
        return self._quantize(x, self.scale, self.zero_point) if self.enabled else x

    def _quantize(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        if len(scale) == 1 and self.step_bits is None:
            return fake_quantize(x, scale, zero_point, self.grid)
        index, grid = self.tracker.index, self.grid
        scale, zero_point = scale[index], zero_point[index]
        rows = (-1, *[1] * (x.dim() - 1)) if scale.dim() else ()
        if self.step_bits is not None:
            grid = _grid(self.step_bits[index].view(rows))
        return fake_quantize(x, scale.view(rows), zero_point.view(rows), grid)

    def _record(self, observer: RangeObserver, x: Tensor) -> None:
        index = self.tracker.index
        if not all_finite(x):
            raise ValueError(f"the activation at {self.path} holds NaN or infinity{self.tracker.where()}")
        if len(observer.low) == 1:
            observer.update(x)
        elif isinstance(index, int):
            observer.update(x, index)
        else:
            for step in index.unique():
                observer.update(x[index == step], int(step))

    def extra_repr(self) -> str:
        table = f", {len(self.scale)} steps" if self.per_step else ""
        return f"bits={self.bits}, symmetric={self.symmetric}, enabled={self.enabled}{table}"


def _grid(bits: Tensor) -> Grid:
    """The unsigned grid of one width, or the ends of several as tensors that broadcast like ``bits``."""
    if not bits.dim():
        return Grid.unsigned(int(bits))
    last = 2 ** bits.long() - 1
    return Grid(torch.zeros_like(last), last)


class SplitFakeQuantize(nn.Module):
    """Own ranges for consecutive groups of channels (dim 1): Q-Diffusion's split of concatenated shortcuts."""

    def __init__(self, sizes: tuple[int, ...], parts: list[FakeQuantize]) -> None:
        super().__init__()
        self.sizes = sizes
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        if not any(part.active for part in self.parts):
            return x
        return torch.cat([part(piece) for part, piece in zip(self.parts, x.split(self.sizes, 1), strict=True)], 1)
