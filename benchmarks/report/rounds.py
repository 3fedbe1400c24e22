"""Which verdicts are decided after so many images, and which cells have to be drawn on. Nothing here touches files.

A claim compares two rows, and is looked at after each round that both have. It is decided when it is *confirmed* or
*contradicted* by its sequential probability, or when the rows are shown to be *equal*, nearer to one another than a
margin. All comparisons of a task are one family, those not measured yet among them: the chance of any false difference
is at most 5 %, whenever one looks, and so is that of calling any rows equal that are not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, stdtrit

from benchmarks.metrics import Metric
from benchmarks.report.findings import (
    CLAIMS,
    CONFIRMED,
    CONTRADICTED,
    EQUAL,
    NOT_APPLICABLE,
    NOTHING,
    OPEN,
    Claim,
    Drawn,
    verdict,
)
from benchmarks.report.inference import LEVEL, Estimate, adjusted
from benchmarks.report.judge import Judge
from benchmarks.report.sequential import critical_values, sequential_p
from benchmarks.report.statistic import RANKED_BY, Values
from benchmarks.report.tables import label
from benchmarks.report.tables.markdown import heading, measured, number
from benchmarks.report.words import line
from benchmarks.suite.params import Suite
from benchmarks.suite.record import FULL_PRECISION, Cell, Record
from benchmarks.suite.sections import Rounds


@dataclass(frozen=True)
class JudgedClaim:
    """A claim at a precision, as far as its rows are drawn.

    Attributes:
        cells: of both rows.
        looks: the difference after each round that both have, in logarithms; a ratio of errors is `exp` of it.
        p: sequential probability of that difference, corrected for all comparisons (Holm).
        verdict: `confirmed`, `contradicted`, `equal` or `open`.
        interval: of the difference, which holds at all looks and for all comparisons that are open; None without looks.
    """

    claim: Claim
    precision: str
    cells: tuple[Cell, ...]
    looks: tuple[Estimate, ...]
    p: float
    verdict: str
    interval: tuple[float, float] | None

    @property
    def ratio(self) -> float | None:
        """Of the error that should be smaller to the other, after the last round."""
        return float(np.exp(self.looks[-1].mean)) if self.looks else None


@dataclass(frozen=True)
class Decision:
    """What is known of a task.

    Attributes:
        claims: of every claim that the suite has both rows of.
        images: of each cell that has any.
        next: cells that are drawn on, full precision among them, and how many images each has after that.
        margin: rows that differ by less than this share are equal.
    """

    claims: tuple[JudgedClaim, ...]
    images: dict[Cell, int]
    next: dict[Cell, int]
    margin: float


def asked(suite: Suite, task: str, claims: Sequence[Claim] = CLAIMS) -> list[tuple[Claim, str, tuple[Cell, ...]]]:
    """The claims of a task that images decide, at each precision at which the suite has both rows, with their cells."""
    rows: dict[tuple[str, str], list[Cell]] = {}
    for cell in suite.cells():
        if cell.task == task and cell.method != FULL_PRECISION:
            rows.setdefault((cell.row, cell.precision), []).append(cell)
    precisions = dict.fromkeys(precision for _, precision in rows)
    return [
        (claim, precision, (*rows[claim.better, precision], *rows[claim.worse, precision]))
        for claim in claims
        if claim.metric == RANKED_BY.name
        for precision in precisions
        if (claim.better, precision) in rows and (claim.worse, precision) in rows
    ]


def decide(
    suite: Suite,
    task: str,
    records: Sequence[Record],
    values: Mapping[Cell, Values],
    metrics: Mapping[str, Metric],
    claims: Sequence[Claim] = CLAIMS,
) -> Decision:
    """Judge all claims of a task of ``suite.rounds`` by the images that its cells have.

    ``values`` are those of each cell's images by metric, and ``records`` say which cells are not applicable. A cell
    that is in no claim has one round.
    """
    rounds = suite.rounds
    counts = rounds.images[task]
    refused = {record.cell for record in records if record.status == NOT_APPLICABLE}
    family = [each for each in asked(suite, task, claims) if not refused & set(each[2])]
    measured = [record for record in records if record.task == task and record.cell in values]
    # Only images that have all the errors count: in a cell of `generate`, the first batch alone has one of them.
    scores = {record.cell: RANKED_BY.of_images(values[record.cell], metrics) for record in measured}
    images = {cell: len(found) for cell, found in scores.items() if found is not None}
    judges = [
        Judge(
            [record for record in measured if images.get(record.cell, 0) >= count],
            {cell: {name: found[:count] for name, found in values[cell].items()} for cell in images},
            metrics,
        )
        for count in counts
    ]
    looks = [_looks(judges, claim, precision) for claim, precision, _ in family]
    judged_claims = _judged_claims(family, looks, counts, rounds.spending, suite.equal_within)
    following = {
        cell: counts[0]
        for cell in suite.cells()
        if cell.task == task and cell.method != FULL_PRECISION and cell not in refused and cell not in images
    }
    for judged in judged_claims:
        if judged.verdict == OPEN and len(judged.looks) < len(counts):
            wanted = counts[len(judged.looks)]
            for cell in judged.cells:
                if images.get(cell, 0) < wanted and (cell in images or wanted == counts[0]):
                    following[cell] = max(following.get(cell, 0), wanted)
    if following:
        full = next(cell for cell in suite.cells() if cell.task == task and cell.method == FULL_PRECISION)
        following = {full: max(following.values())} | following
    return Decision(judged_claims, images, following, suite.equal_within)


def _looks(judges: Sequence[Judge], claim: Claim, precision: str) -> tuple[Estimate, ...]:
    found = []
    for judge in judges:
        compared = judge.compare(claim.metric, claim.better, claim.worse, precision)
        if compared is None or compared.estimate is None:
            break
        found.append(compared.estimate)
    return tuple(found)


def _judged_claims(
    family: Sequence[tuple[Claim, str, tuple[Cell, ...]]],
    looks: Sequence[tuple[Estimate, ...]],
    counts: Sequence[int],
    spending: str,
    margin: float,
) -> tuple[JudgedClaim, ...]:
    fractions = [count / counts[-1] for count in counts]
    differ = adjusted([sequential_p([look.p for look in each], fractions, spending) for each in looks])
    # A one-sided test has half of the probability of both sides.
    room = float(np.log1p(margin))
    near = [sequential_p([2 * look.p_near(room) for look in each], fractions, spending) for each in looks]
    equal = adjusted([p / 2 if p < 1 else 1.0 for p in near])
    left = max(sum(p >= LEVEL for p in differ), 1)
    judged_claims = []
    for (claim, precision, cells), each, p, same in zip(family, looks, differ, equal, strict=True):
        said = verdict(each[-1], p, "lower") if each else OPEN
        if said == OPEN and each and same < LEVEL:
            said = EQUAL
        interval = _interval(each, LEVEL / left, fractions, spending) if each else None
        judged_claims.append(JudgedClaim(claim, precision, cells, each, p, said, interval))
    return tuple(judged_claims)


def _interval(
    looks: Sequence[Estimate], level: float, fractions: Sequence[float], spending: str
) -> tuple[float, float]:
    last = looks[-1]
    tail = float(ndtr(-critical_values(fractions[: len(looks)], level, spending)[-1]))
    reach = -float(stdtrit(last.degrees, max(tail, 1e-300))) * last.error if last.error else 0.0
    return last.mean - reach, last.mean + reach


def decided(decision: Decision) -> list[Drawn]:
    """The claims that rounds have decided, as the page of findings shows them."""
    return [
        Drawn(
            judged.claim,
            judged.precision,
            judged.verdict,
            judged.looks[-1].images,
            f"within {decision.margin:.0%}" if judged.verdict == EQUAL else f"p {_p(judged)}",
        )
        for judged in decision.claims
        if judged.verdict != OPEN
    ]


def page(task: str, decision: Decision, rounds: Rounds) -> str:
    """Markdown: a line for each claim, and what is drawn next."""
    counts = rounds.images[task]
    said = [judged.verdict for judged in decision.claims]
    tally = ", ".join(f"{said.count(name)} {name}" for name in (CONFIRMED, CONTRADICTED, EQUAL, OPEN))
    near = f"; nearer than {decision.margin:.0%} is equal" if decision.margin else ""
    parts = [
        f"# {task}, in rounds of {', '.join(f'{count:,}' for count in counts)} images",
        f"Of {len(said)} comparisons: {tally}. The level of {LEVEL:.0%} is spent over the rounds ({rounds.spending}),"
        f" and corrected for all comparisons (Holm){near}. Intervals hold at all rounds together. Rows with one"
        " calibration seed are compared over images alone: another calibration may move what is near.",
    ]
    if decision.claims:
        parts.append("\n".join([line(HEAD), line([":--"] * len(HEAD)), *map(_row, decision.claims)]))
    if decision.next:
        cells = [f"- {cell.name.split('/', 1)[1]}: {images:,} images" for cell, images in decision.next.items()]
        parts.append("Next, by `--draw`:\n\n" + "\n".join(cells))
    else:
        parts.append("No cell goes on.")
    return "\n\n".join(parts)


def full_counts(records: Sequence[Record], metrics: Mapping[str, Metric]) -> str:
    """Markdown: what the features of all images of some cells of one task say, a line a cell."""
    columns = measured(metrics, records)
    head = ["All images of", "Images", *(heading(metric, records) for metric in columns.values()), "Note"]
    lines = [line(head), line([":--", *["--:"] * (len(head) - 2), ":--"])]
    for record in records:
        values = [number(record.metrics.get(name), metric.digits, interval=True) for name, metric in columns.items()]
        images = f"{record.settings['task']['images']:,}" if record.metrics else NOTHING
        lines.append(line([record.cell.name.split("/", 1)[1], images, *values, record.reason]))
    return "\n".join(lines)


HEAD = ("Claim", "Precision", "Should be better", "Than", "Ratio", "Images", "p", "Verdict")


def _row(judged: JudgedClaim) -> str:
    claim, images = judged.claim, judged.looks[-1].images if judged.looks else 0
    ratio = NOTHING
    if judged.looks and judged.interval is not None:
        low, high = (float(np.exp(end)) for end in judged.interval)
        ratio = f"{judged.ratio:.3g} [{low:.3g}, {high:.3g}]"
    rows = [_label(row) for row in (claim.better, claim.worse)]
    return line([claim.text, judged.precision, *rows, ratio, f"{images:,}", _p(judged), judged.verdict])


def _p(judged: JudgedClaim) -> str:
    return "< 0.001" if judged.p < 0.001 else f"{judged.p:.2g}"


def _label(row: str) -> str:
    method, *differences = row.split("-")
    return label(method) + (f" ({', '.join(differences)})" if differences else "")
