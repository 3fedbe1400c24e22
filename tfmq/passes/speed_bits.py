"""Widths of activations that follow how fast the latents move: the switch of DyQ-VLA, transferred to denoising.

DyQ-VLA (arXiv 2603.07904) quantises robots' vision-language-action models. While an arm moves far its actions bear few
bits, and fine or abrupt motion needs more; a lookup table gives the width for what the joints do, with hysteresis, so
that it does not flicker. Here latents take the place of the arm, and the steps of a schedule that of control steps.
Since one schedule moves the latents of all images in nearly the same way, the widths are found once, on the calibration
pool.

At step i, with latents x_i and the mean over images,

    v_i = ||x_{i+1} - x_i|| / ||x_i||  (speed),    c_i = |v_i - v_{i-1}|  (its change; 0 at the first step),
    d_i = (1 - w) (1 - v_i / max v) + w c_i / max c  (demand, 0 to 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from tfmq.network.calibration import CalibrationSet
from tfmq.passes import Pass
from tfmq.passes.step_bits import ranges_of, set_bits
from tfmq.plan import activation_quantizers, plan_for
from tfmq.precision import FULL
from tfmq.session import Session
from tfmq.settings import check_choices, check_numbers
from tfmq.state import check_finished

FEWEST = 2


@dataclass(frozen=True)
class SpeedBits(Pass):
    """Give activations a width at each time step, by the speed of the latents, in the ranges that they have.

    The lookup table has a row for each width: thresholds that cut the demands of all steps in parts of one size, moved
    up together until the mean width over the schedule is no more than the precision's. Layers that the protocol keeps
    at more bits keep them. Goes last; ranges of all steps or of each are kept, and cut in 2^bits - 1 parts.

    The report's details get ``average_activation_bits``, the mean over the evaluations of the schedule, the width of
    each time step (``activation_bits``), and ``speeds``, ``changes`` and ``demands`` in the order of the schedule.

    Attributes:
        offsets: widths to choose from, as differences to the bits of the precision's activations.
        change_weight: w, the part of the change in the demand.
        margin: by how much the demand has to pass a threshold before the width changes.
        fast: whether fast motion gets ``fewer`` bits, as DyQ-VLA has it, or ``more``, where 1 - v / max v is v / max v.
    """

    offsets: tuple[int, ...] = (-2, 0, 2)
    change_weight: float = 0.25
    margin: float = 0.05
    fast: Literal["fewer", "more"] = "fewer"

    def __post_init__(self) -> None:
        check_choices(self)
        check_numbers(self, "change_weight", "margin", least=0, most=1)
        if not self.offsets or list(self.offsets) != sorted(set(self.offsets)) or self.offsets[0] > 0:
            raise ValueError(
                f"offsets is {self.offsets!r}: give differences to the precision's bits in ascending order, the first "
                "not above 0"
            )

    @torch.no_grad()
    def run(self, session: Session, rows: None) -> None:
        """See `Pass`. Raises ValueError for a width below 2 bits, and where activations have no ranges yet."""
        network, pool, bits = session.network, session.pool, session.precision.activation_bits
        check_finished(network, self.name)
        if bits == FULL:
            return
        widths = [bits + offset for offset in self.offsets]
        if widths[0] < FEWEST:
            least = FEWEST - bits
            raise ValueError(f"offsets {self.offsets!r} give {bits}-bit activations {widths[0]} bits: begin at {least}")
        speeds = latent_speeds(pool)
        changes = speed_changes(speeds)
        demands = bit_demands(speeds, changes, self.change_weight, self.fast == "fewer")
        timesteps, where, visits = pool.timesteps.cpu().unique(return_inverse=True, return_counts=True)
        # A step that the schedule repeats has one width, that of its largest demand; the noisiest comes first.
        at_step = demands.new_zeros(len(timesteps)).scatter_reduce_(0, where, demands, "amax").flip(0)
        chosen = torch.tensor(widths)[affordable_rows(at_step, widths, self.margin, bits, visits.flip(0))].flip(0)
        self._switch(session, chosen, timesteps)
        session.report.details |= {
            "average_activation_bits": average_width(chosen, visits),
            "activation_bits": {str(t): b for t, b in zip(timesteps.tolist(), chosen.tolist(), strict=True)},
            "speeds": speeds.tolist(),
            "changes": changes.tolist(),
            "demands": demands.tolist(),
        }

    def _switch(self, session: Session, chosen: Tensor, timesteps: Tensor) -> None:
        """Give every quantiser its range in the ``chosen`` widths (S,) of the ascending ``timesteps`` (S,)."""
        network = session.network
        given = ranges_of(network)
        at_step: dict[str, list[int]] = {path: [] for path in given}
        for bits in chosen.tolist():
            for path, width in _widths(session, bits).items():
                at_step[path].append(width)
        network.step_tracker.steps = timesteps
        for path, quantizer in activation_quantizers(network).items():
            before, scale, zero_point = given[path]
            quantizer.bits = before
            widths = torch.tensor(at_step[path], device=scale.device)
            quantizer.mix_bits(widths, *in_other_bits(scale, zero_point, before, widths))


def _widths(session: Session, activation_bits: int) -> dict[str, int]:
    """The width of each quantiser, by path, at so many bits of the precision's activations."""
    precision = replace(session.precision, activation_bits=activation_bits)
    set_bits(session.network, plan_for(session.full, session.backbone, precision, session.protocol))
    return {path: quantizer.bits for path, quantizer in activation_quantizers(session.network).items()}


def latent_speeds(pool: CalibrationSet) -> Tensor:
    """v_i of the module's text, for each evaluation of the schedule, the noisiest first: float64 (steps,)."""
    latents = torch.cat([pool.latents, pool.samples[None]]).double().cpu().flatten(2)
    return ((latents[1:] - latents[:-1]).norm(dim=2) / latents[:-1].norm(dim=2)).mean(1)


def speed_changes(speeds: Tensor) -> Tensor:
    """c_i of the module's text."""
    return torch.cat([speeds.new_zeros(1), (speeds[1:] - speeds[:-1]).abs()])


def bit_demands(speeds: Tensor, changes: Tensor, weight: float, slow_needs_more: bool) -> Tensor:
    """d_i of the module's text, from 0 to 1; with v / max v in its first part if slow motion does not need more."""
    fast = speeds / speeds.max().clamp_min(1e-12)
    first = 1 - fast if slow_needs_more else fast
    return (1 - weight) * first + weight * changes / changes.max().clamp_min(1e-12)


def looked_up(demands: Tensor, thresholds: Sequence[float], margin: float) -> Tensor:
    """The row of the lookup table for each demand, in their order: int64 (steps,), 0 to len(thresholds).

    The first is the number of ``thresholds``, ascending, that its demand is above. From then on a threshold has to be
    passed by more than ``margin``, upwards or downwards, before the row changes.
    """
    row = sum(demands[0].item() > threshold for threshold in thresholds)
    rows = []
    for demand in demands.tolist():
        while row < len(thresholds) and demand > thresholds[row] + margin:
            row += 1
        while row > 0 and demand < thresholds[row - 1] - margin:
            row -= 1
        rows.append(row)
    return torch.tensor(rows)


def affordable_rows(demands: Tensor, widths: Sequence[int], margin: float, most: float, visits: Tensor) -> Tensor:
    """The rows of the lookup table for demands (steps,), of which the mean width is ``most`` at most: int64 (steps,).

    Thresholds begin where they cut the demands in parts of one size, and move up together, one demand at a time.
    ``visits`` (steps,) are how often the schedule evaluates each step. Where no thresholds do, all get the first row.
    """
    ordered = demands.sort().values.tolist()
    for rise in range(len(ordered)):
        places = [len(ordered) * part // len(widths) - 1 + rise for part in range(1, len(widths))]
        thresholds = [ordered[min(max(place, 0), len(ordered) - 1)] for place in places]
        rows = looked_up(demands, thresholds, margin)
        if average_width(torch.tensor(widths)[rows], visits) <= most:
            return rows
    return torch.zeros(len(ordered), dtype=torch.int64)


def average_width(widths: Tensor, visits: Tensor) -> float:
    """The mean of widths (steps,) over the evaluations of a schedule."""
    return ((widths * visits).sum() / visits.sum()).item()


def in_other_bits(scale: Tensor, zero_point: Tensor, before: int, widths: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and zero points (S,) of the same ranges in other ``widths`` (S,), of those in ``before`` bits, (1,) or
    (S,).

    The length of a range is (2^bits - 1) scale; the zero point is the code nearest to 0 in the new grid.
    """
    factor = (2.0**before - 1) / (2.0**widths - 1)
    return scale * factor, torch.round(zero_point / factor)
