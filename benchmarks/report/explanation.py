"""What keeping temporal features buys, when and why, in words that follow from the records. Touches no files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr

from benchmarks.report.inference import Estimate
from benchmarks.report.judge import Judge
from benchmarks.report.statistic import RANKED_BY
from benchmarks.report.words import line, named, ratio
from benchmarks.suite.record import Cell
from tfmq.precision import Precision

TITLE = "What keeping temporal features buys"
BASE, EXACT, METHOD, RIVAL = "prev", "full_precision_temporal", "tfmq", "qdiffusion"
# The parts of the ablation, in the order of the table.
PARTS = {
    EXACT: "Exact temporal features (the bound)",
    METHOD: "TFMQ-DM",
    "tiar": "its reconstruction alone",
    "fsc": "its calibration alone",
    "cache": "features from a cache",
    "freeze": "time layers rounded to nearest",
}
HEAD = ("Task", "Precision", *PARTS.values(), "Share of the noise error", "Temporal error")
# Fewer pairs have no correlation to speak of.
FEWEST = 4
NOTHING = "–"


@dataclass(frozen=True)
class Place:
    """A task at a precision."""

    task: str
    precision: str
    judge: Judge

    def change(self, row: str, other: str, measure: str = RANKED_BY.name) -> Estimate | None:
        """The difference of two rows, in logarithms; None where one of them is not measured."""
        found = self.judge.compare(measure, row, other, self.precision)
        return None if found is None else found.estimate

    @property
    def name(self) -> str:
        return f"{self.task} at {self.precision}"


def text(judges: Mapping[str, Judge], steps: Mapping[Cell, np.ndarray]) -> str:
    """Markdown: sentences, and the table that they are read from; empty where neither ablation nor rival is measured.

    ``steps`` holds the temporal error of cells at each step (T,), the noisiest first.
    """
    places = [Place(task, precision, judge) for task, judge in judges.items() for precision in judge.precisions]
    ablated = [place for place in places if place.change(EXACT, BASE) is not None]
    rivals = [place for place in places if place.change(METHOD, RIVAL) is not None]
    parts = []
    if ablated:
        parts += ["\n\n".join(_bound(place) for place in ablated), _over_steps(ablated, steps), _table(ablated)]
    if rivals:
        parts += [_against(rivals), _when(rivals)]
    return "\n\n".join(part for part in parts if part)


def _bound(place: Place) -> str:
    """What exact temporal features gain on a task, what the method gains, and why it is not more."""
    exact, method = place.change(EXACT, BASE), place.change(METHOD, BASE)
    share = place.judge.compare("noise_error", EXACT, BASE, place.precision)
    sentences = [
        f"**{place.name}.** With the layers of the time step in full precision, the deviation of the base's images"
        f" {_moved(exact)}{_uncertain(exact)}."
    ]
    if share is not None:
        part = 1 - np.exp(2 * share.parts.mean)
        carried = f"temporal features carry {part:.0%}" if part > 0.005 else "temporal features carry next to nothing"
        sentences.append(
            f"Why: {carried} of the squared error of the predicted noise; the rest is that of other layers."
        )
    if method is not None:
        temporal = place.judge.compare("temporal_error", METHOD, BASE, place.precision)
        lowered = "" if temporal is None else f" makes the temporal features {_times(temporal.parts.mean)} and"
        sentences.append(f"TFMQ-DM{lowered} {_moves(method, 'the deviation')}{_uncertain(method)}.")
        if method.mean < exact.mean and not _stays(method):
            sentences.append(
                "What it lowers beyond exact temporal features is no gain in these: other layers were learned"
                " otherwise, or it is chance."
            )
        alone = {name: place.change(name, BASE) for name in ("tiar", "fsc")}
        said = [f"{PARTS[name]} {_moves(found, 'it')}" for name, found in alone.items() if found is not None]
        if said:
            sentences.append(f"Of its two parts, {' and '.join(said)}.")
    return " ".join(sentences)


def _over_steps(places: Sequence[Place], steps: Mapping[Cell, np.ndarray]) -> str:
    """Where along the trajectory the temporal error is, before and after."""
    said = []
    for place in places:
        curves = [steps.get(Cell(place.task, row, place.precision)) for row in (BASE, METHOD)]
        if any(curve is None or len(curve) < 3 or curve.sum() == 0 for curve in curves):
            continue
        third = len(curves[0]) // 3
        before, after = ([float(curve[:third].mean()), float(curve[-third:].mean())] for curve in curves)
        where = "its noisy beginning" if before[0] > before[1] else "its end, where images get their detail"
        said.append(
            f"{place.name}, the base's features are off most at {where} (mean 1 - cosine {before[0]:.2g} in the first"
            f" third of the steps, {before[1]:.2g} in the last); TFMQ-DM leaves {after[0]:.2g} and {after[1]:.2g}"
        )
    return f"Over the steps of sampling: {'; '.join(said)}." if said else ""


def _table(places: Sequence[Place]) -> str:
    lines = [line(HEAD), line(["--:" if index > 1 else ":--" for index in range(len(HEAD))])]
    for place in places:
        fields = [place.task, place.precision]
        for row in PARTS:
            found = place.change(row, BASE)
            fields.append(NOTHING if found is None else ratio(found))
        share = place.judge.compare("noise_error", EXACT, BASE, place.precision)
        # Nothing is not less than nothing: 0.0 takes the sign from what rounds to it.
        fields.append(NOTHING if share is None else f"{round(1 - np.exp(2 * share.parts.mean), 2) + 0.0:.0%}")
        temporal = [place.judge.mean("temporal_error", row, place.precision) for row in (BASE, METHOD)]
        fields.append(NOTHING if None in temporal else " to ".join(f"{np.exp(value):.2g}" for value in temporal))
        lines.append(line(fields))
    caption = (
        "Ratio of the deviation to that of the base, which is TFMQ-DM without its idea (`prev`), with 95 % intervals."
        " *Share of the noise error*: how much smaller the squared error of the predicted noise is with exact temporal"
        " features. *Temporal error*: of the base, and of TFMQ-DM."
    )
    return f"{caption}\n\n" + "\n".join(lines)


def _against(places: Sequence[Place]) -> str:
    """TFMQ-DM beside the method that treats temporal layers as all others, on every task."""
    found = {place.name: place.change(METHOD, RIVAL) for place in places}
    better = [name for name, change in found.items() if change.value.high < 0]
    worse = [name for name, change in found.items() if change.value.low > 0]
    closer = [
        place for place in places if place.judge.compare("temporal_error", METHOD, RIVAL, place.precision) is not None
    ]
    nearer = [p for p in closer if p.judge.compare("temporal_error", METHOD, RIVAL, p.precision).parts.mean < 0]
    features = f"it has the smaller temporal error in {len(nearer)} of {len(closer)} comparisons, " if closer else ""
    return (
        "**Against Q-Diffusion**, which reconstructs temporal layers like all others and learns step sizes,"
        f" {features}the smaller deviation, beyond its interval, in {len(better)} of {len(found)}{named(better)}, and"
        f" the larger in {len(worse)}{named(worse)}."
    )


def _when(places: Sequence[Place]) -> str:
    """Whether gains follow bits, and the size of the temporal error."""
    changes = {place: place.change(METHOD, RIVAL).mean for place in places}
    sentences = []
    by_bits: dict[str, list[float]] = {}
    for place, change in changes.items():
        by_bits.setdefault(place.precision, []).append(change)
    if len(by_bits) > 1:
        ordered = sorted(by_bits, key=_bits)
        said = ", ".join(f"{np.exp(np.mean(by_bits[p])):.2f} at {p} ({len(by_bits[p])} tasks)" for p in ordered)
        sentences.append(f"By bits, the ratio of their deviations is {said}, geometric means over tasks.")
    tasks = {place.task for place in places}
    if len(tasks) > 1:
        of_task = {task: np.mean([v for place, v in changes.items() if place.task == task]) for task in tasks}
        least, most = min(of_task, key=of_task.get), max(of_task, key=of_task.get)
        sentences.append(
            f"By model, it is smallest on {least} ({np.exp(of_task[least]):.2f}) and largest on {most}"
            f" ({np.exp(of_task[most]):.2f})."
        )
    errors = {place: place.judge.mean("temporal_error", RIVAL, place.precision) for place in places}
    pairs = [(errors[place], change) for place, change in changes.items() if errors[place] is not None]
    if len(pairs) >= FEWEST and all(len(set(values)) > 1 for values in zip(*pairs, strict=True)):
        rho = float(spearmanr(*zip(*pairs, strict=True)).statistic)
        follows = "follows" if rho < -0.4 else "goes against" if rho > 0.4 else "does not follow"
        sentences.append(
            f"The gain {follows} the size of the temporal error that there is to lower (Spearman's correlation"
            f" {-rho:.2f} over {len(pairs)} comparisons)."
        )
    return " ".join(sentences)


def _bits(precision: str) -> tuple[int, int]:
    found = Precision.parse(precision)
    return -found.weight_bits, -found.activation_bits


def _moved(found: Estimate) -> str:
    if _stays(found):
        return f"stays as it is {_range(found)}"
    return f"{'falls' if found.mean < 0 else 'rises'} {_by(found)}"


def _moves(found: Estimate, what: str) -> str:
    if _stays(found):
        return f"leaves {what} as it is {_range(found)}"
    return f"{'lowers' if found.mean < 0 else 'raises'} {what} {_by(found)}"


def _stays(found: Estimate) -> bool:
    return f"{abs(1 - np.exp(found.mean)):.0%}" == "0%"


def _by(found: Estimate) -> str:
    return f"by {abs(1 - np.exp(found.mean)):.0%} {_range(found)}"


def _range(found: Estimate) -> str:
    return f"[{np.exp(found.value.low) - 1:+.0%}, {np.exp(found.value.high) - 1:+.0%}]"


def _uncertain(found: Estimate) -> str:
    value = found.value
    return ", and that is no more than chance" if value.low <= 0 <= value.high and not _stays(found) else ""


def _times(mean: float) -> str:
    ratio = np.exp(mean)
    return f"{1 / ratio:.2g} times more exact" if ratio < 1 else f"{ratio:.2g} times less exact"
