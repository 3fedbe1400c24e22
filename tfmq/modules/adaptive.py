"""A quantiser of attention probabilities whose grid is uniform or logarithmic, as their distribution asks for."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from tfmq.modules.fake_quantize import FakeQuantize, StepTracker
from tfmq.numerics.logarithmic import log2_fake_quantize
from tfmq.numerics.observer import RangeObserver
from tfmq.numerics.power_law import follows_power_law

LOGARITHMIC = "the grid of its probabilities may be logarithmic"
GOLDEN = (math.sqrt(5) - 1) / 2


class AdaptiveQuantize(FakeQuantize):
    """Quantise-dequantise probabilities on a uniform grid from 0 on or on a logarithmic one, for each time step.

    ``observe_distribution`` instead of ``observe`` lets ``freeze`` choose; until then, and after ``observe``, it is a
    `FakeQuantize` of what is not negative. On a logarithmic grid ``scale`` is the largest value.

    Buffers:
        logarithmic: uint8, (1,) or (S,) as ``scale``: 1 where the grid is logarithmic.
    """

    logarithmic: Tensor

    def __init__(self, bits: int, tracker: StepTracker) -> None:
        super().__init__(bits, tracker, positive=True)
        self.register_buffer("logarithmic", torch.zeros(1, dtype=torch.uint8))

    def observe_distribution(self, samples: int, significance: float, per_step: bool) -> None:
        """Start recording ranges and, of each batch of a time step, so many values at most; see `freeze`."""
        self.observer = DistributionObserver(samples, significance, len(self.tracker.steps) if per_step else 0)

    def freeze(self) -> None:
        """See `FakeQuantize`; takes a logarithmic grid where the recorded values follow a power law."""
        observer = self.observer
        super().freeze()
        logarithmic = torch.zeros(len(self.scale), dtype=torch.uint8, device=self.scale.device)
        if isinstance(observer, DistributionObserver):
            logarithmic = observer.follows_power_law().to(logarithmic)
            self.scale = torch.where(logarithmic.bool(), observer.high.to(self.scale), self.scale)
        self.logarithmic = logarithmic

    def mix_bits(self, step_bits: Tensor, scale: Tensor, zero_point: Tensor) -> None:
        """Raises ValueError: its grid is chosen for one width."""
        raise ValueError(f"{self.path} chooses its grid by the distribution: its width can not vary over time steps")

    def _quantize(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        if self.logarithmic.is_meta:  # where memory is counted: the costlier of both
            return log2_fake_quantize(x, scale[:1], self.bits)
        index = 0 if len(self.logarithmic) == 1 else self.tracker.index
        chosen = self.logarithmic[index].bool()
        if not chosen.any():
            return super()._quantize(x, scale, zero_point)
        largest = scale[index if len(scale) > 1 else 0]
        if chosen.all():
            return log2_fake_quantize(x, _beside(largest, x), self.bits)
        on_both = super()._quantize(x, scale, zero_point), log2_fake_quantize(x, _beside(largest, x), self.bits)
        return torch.where(_beside(chosen, x), on_both[1], on_both[0])

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *args: object) -> None:
        stored = state_dict.get(f"{prefix}logarithmic")
        if stored is not None:  # which is one of all steps, or one for each
            self.logarithmic = torch.empty_like(stored, device=self.logarithmic.device)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _beside(values: Tensor, x: Tensor) -> Tensor:
    """One value, or one for each row, in a shape that broadcasts against ``x`` (B, ...)."""
    return values.view(-1, *[1] * (x.dim() - 1)) if values.dim() else values


class DistributionObserver(RangeObserver):
    """The widest range of a tensor over several batches, with some values of each, spread over all of it.

    Positions follow multiples of the golden ratio, so that they fall into step with no dimension of the tensor.
    """

    def __init__(self, samples: int, significance: float, steps: int = 0) -> None:
        super().__init__(None, steps)
        self.samples, self.significance = samples, significance
        self.values: list[list[Tensor]] = [[] for _ in self.low]

    def update(self, x: Tensor, step: int = 0) -> None:
        """Take in one batch of finite values, all of one time step."""
        super().update(x, step)
        flat, count = x.detach().flatten(), min(self.samples, x.numel())
        shares = torch.arange(count, dtype=torch.float64).mul_(GOLDEN).frac_()
        self.values[step].append(flat[(shares * flat.numel()).long().to(flat.device)].cpu())

    def follows_power_law(self) -> Tensor:
        """Whether the positive values of each step do, (steps,); see `tfmq.numerics.power_law`."""
        found = []
        for values in self.values:
            positive = torch.cat(values)
            positive = positive[positive > 0]
            found.append(bool(follows_power_law(positive, self.significance)) if len(positive) > 1 else False)
        return torch.tensor(found)
