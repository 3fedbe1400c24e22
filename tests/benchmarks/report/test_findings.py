"""Verdicts on claims, and the page that lists them."""

import numpy as np
import pytest

from benchmarks.metrics import metrics
from benchmarks.report import findings
from benchmarks.report.findings import Claim, Drawn, page, verdict
from benchmarks.report.inference import Estimate
from benchmarks.report.statistic import RANKED_BY
from benchmarks.suite import discover


@pytest.mark.parametrize(
    ("mean", "p", "direction", "expected"),
    [
        (-0.1, 0.01, "lower", "confirmed"),
        (0.1, 0.01, "lower", "contradicted"),
        (-0.1, 0.06, "lower", "open"),
        (0.1, 0.01, "higher", "confirmed"),
        (-0.1, 0.01, "higher", "contradicted"),
        (0.0, 0.0, "lower", "open"),
    ],
)
def test_only_corrected_probabilities_decide(mean, p, direction, expected):
    assert verdict(Estimate(mean, 0.1, 9, 50, 1), p, direction) == expected
    assert verdict(None, p, direction) == "open"


def show(rows, claims, **changes):
    return page(rows.records, rows.judges, metrics(), claims, **changes)


def lines(text, heading):
    """The rows of the table under a heading, as lists of their fields."""
    body = text.split(f"{heading}\n\n", 1)[1].split("\n\n")[0]
    return [[field.strip() for field in line.split("|")[1:-1]] for line in body.splitlines()[2:]]


def test_every_claim_has_a_verdict_on_every_task(rows):
    for task in ("one", "two"):
        rows.add("tfmq", -2.0, noise=0.01, task=task)
        rows.add("qdiffusion", -1.9, noise=0.01, task=task)
    rows.add("nearest", -1.8, noise=1.0, task="one")
    rows.add("tfmq-published", -2.2, noise=0.01, task="one")
    rows.add("ptqd", -2.2, task="two", precision="w8a8")
    for task in ("one", "two"):
        rows.records.append(
            rows.make_record(task=task, method="tdq", status="not applicable", reason="x", metrics={}, cost=None)
        )
    claims = [
        Claim("first", "someone", "tfmq", "qdiffusion"),
        Claim("second", "someone", "qdiffusion", "tfmq"),
        Claim("third", "someone", "nearest", "qdiffusion"),
        Claim("fourth", "someone", "tfmq-published", "tfmq"),
        Claim("fifth", "someone", "ptqd", "tfmq"),
        Claim("sixth", "someone", "tdq", "tfmq"),
    ]
    text = show(rows, claims)
    overview = {row[0]: row[2:] for row in lines(text, "## Verdicts")}
    assert overview == {
        "first": 2 * ["**confirmed** w4a8"],
        "second": 2 * ["**contradicted** w4a8"],
        "third": ["open w4a8", "–"],
        "fourth": ["**confirmed** w4a8", "–"],
    }
    assert "Of 4 comparisons: 2 confirmed, 1 contradicted, 1 open." in text
    (confirmed, fourth), (undecided,) = lines(text, "### one: confirmed"), lines(text, "### one: open")
    levels = [np.exp(rows.judges["one"].mean(RANKED_BY.name, row, "w4a8")) for row in ("tfmq", "qdiffusion")]
    assert confirmed[4:6] == [f"TFMQ-DM {levels[0]:.3g}", f"Q-Diffusion {levels[1]:.3g}"]
    assert confirmed[6].startswith("0.9") and confirmed[7:] == ["1", "< 0.001"]
    assert fourth[4].startswith("TFMQ-DM (published)") and "None." in text.split("### two: open")[1]
    assert "1 seed of" in undecided[-1] and int(undecided[-1].split()[3].replace(",", "")) > 48


def test_a_claim_that_rows_refuse_is_not_applicable(rows):
    rows.add("tfmq", -2.0, noise=0.01, task="one")
    rows.add("tdq", -1.9, noise=0.01, task="one")
    rows.add("tfmq", -2.0, noise=0.01, task="two")
    rows.add("nearest", -1.5, noise=0.01, task="two")
    refused = {"status": "not applicable", "reason": "x", "metrics": {}, "cost": None}
    rows.records.append(rows.make_record(task="two", method="tdq", **refused))
    claims = [Claim("first", "us", "tfmq", "tdq"), Claim("second", "us", "tfmq", "nearest")]
    overview = {row[0]: row[2:] for row in lines(show(rows, claims), "## Verdicts")}
    assert overview["first"] == ["**confirmed** w4a8", "not applicable"]
    assert overview["second"] == ["–", "**confirmed** w4a8"]


def test_calibrations_are_part_of_what_is_uncertain(rows):
    """Images alone would decide each; seeds go to and fro."""
    generator = np.random.default_rng(1)
    for row in ("tfmq", "qdiffusion", "ptqd", "gptq"):
        for seed in range(3):
            rows.add(row, -2 + 0.1 * generator.normal(), noise=0.01, seed=seed)
    text = show(rows, [Claim("first", "us", "tfmq", "qdiffusion")])
    (row,) = lines(text, "### emoji-ldm4: open")
    assert row[7] == "3" and "seeds of 32 images" in row[-1] and "between calibration seeds, relative to" in text


def test_rows_that_are_shown_to_be_near_are_equal(rows):
    for row, level in (("tfmq", -2.0), ("qdiffusion", -2.01), ("ptqd", -1.995), ("nearest", -1.0)):
        rows.add(row, level, noise={"tfmq": 0.001, "nearest": 0.001}.get(row, 0.05))
    claims = [
        Claim("near", "us", "qdiffusion", "tfmq"),
        Claim("far", "us", "tfmq", "nearest"),
        Claim("noise", "us", "ptqd", "qdiffusion"),
    ]
    text = show(rows, claims, margin=0.1)
    overview = {row[0]: row[2] for row in lines(text, "## Verdicts")}
    assert overview == {"near": "**equal** w4a8", "far": "**confirmed** w4a8", "noise": "**equal** w4a8"}
    assert (
        "shown to be less than 10% above the smaller one" in text
        and "1 confirmed, 0 contradicted, 2 equal, 0 little or no gain, 0 open" in text
    )
    strict = show(rows, claims, margin=0.015)
    assert {row[0]: row[2] for row in lines(strict, "## Verdicts")}["near"] == "open w4a8"
    assert "equal" not in show(rows, claims).split("## Verdicts")[0], "without a margin none are"


def test_tasks_together_decide_what_none_decides_alone(rows):
    tasks = ("one", "two", "three", "four", "five")
    generator = np.random.default_rng(0)
    for task in tasks:
        for row, level in (("tfmq", -2.0), ("qdiffusion", -1.9)):
            for seed in range(3):
                rows.add(row, level + 0.03 * generator.normal(), noise=0.05, task=task, seed=seed)
        rows.add("ptqd", -3.0, noise=0.05, task=task)
    claims = [Claim("gain", "us", "tfmq", "qdiffusion"), Claim("one seed", "us", "ptqd", "tfmq")]
    text = show(rows, claims)
    overview = {row[0]: row[2:] for row in lines(text, "## Verdicts")}
    assert overview["gain"][-1] == "**confirmed** w4a8" and overview["gain"].count("open w4a8") >= 3
    assert overview["one seed"][-1] == "–", "without seeds of its own nothing says how it varies"
    section = text.split("## Over tasks")[1].split("\n## ")[0]
    assert "Of 1 comparisons: 1 confirmed, 0 contradicted, 0 open." in section
    (row,) = lines(section, "0 open.")
    differences = [rows.judges[task].compare(RANKED_BY.name, "tfmq", "qdiffusion", "w4a8").parts.mean for task in tasks]
    assert row[:2] == ["confirmed", "gain"] and row[6] == "5"
    assert float(row[5].split()[0]) == pytest.approx(np.exp(np.mean(differences)), abs=1e-3)
    few = {task: rows.judges[task] for task in tasks[:2]}
    assert "Over tasks |" not in page([r for r in rows.records if r.task in few], few, metrics(), claims)


def test_where_only_a_gain_is_ruled_out_it_is_little_or_none(rows):
    """The row may be worse by more than the margin, but not better by that."""
    for row, level, noise in (("tfmq", -2.0, 0.001), ("ptqd", -1.94, 0.2), ("gptq", -2.06, 0.2)):
        rows.add(row, level, noise=noise)
    claims = [Claim("loses", "us", "ptqd", "tfmq"), Claim("gains", "us", "gptq", "tfmq")]
    text = show(rows, claims, margin=0.1)
    overview = {row[0]: row[2] for row in lines(text, "## Verdicts")}
    assert overview == {"loses": "**little or no gain** w4a8", "gains": "open w4a8"}
    assert "0 equal, 1 little or no gain, 1 open" in text
    (row,) = lines(text, "### emoji-ldm4: little or no gain")
    assert row[0] == "loses" and row[8] == "< 0.001"
    assert "no gain" not in show(rows, claims), "without a margin there is none"


@pytest.mark.parametrize(("level", "said"), [(-1.98, "contradicted"), (-2.02, "confirmed")])
def test_what_surely_differs_is_neither_equal_nor_little(rows, level, said):
    rows.add("tfmq", -2.0, noise=0.001)
    rows.add("ptqd", level, noise=0.001)
    text = show(rows, [Claim("it", "us", "ptqd", "tfmq")], margin=0.1)
    assert [row[2] for row in lines(text, "## Verdicts")] == [f"**{said}** w4a8"]


def test_plans_are_at_the_levels_that_are_left(rows):
    """Equal rows still count among those that do not differ, and rows that gain among those whose gain may be large."""
    for row, level, noise in (
        ("tfmq", -2.0, 0.001),
        ("ptqd", -2.0, 0.01),
        ("nearest", -1.0, 0.001),
        ("gptq", -2.05, 0.3),
    ):
        rows.add(row, level, noise=noise)
    claims = [
        Claim("equal", "us", "ptqd", "tfmq"),
        Claim("open", "us", "gptq", "tfmq"),
        Claim("far", "us", "tfmq", "nearest"),
    ]
    judged = findings.judge(claims, rows.judges["emoji-ldm4"], metrics(), 0.1)
    assert [each.verdict for each in judged] == ["equal", "open", "confirmed"]
    assert {each.levels for each in judged} == {(0.05 / 2, 0.05 / 2)}


def test_the_more_is_claimed_the_more_it_takes(rows):
    """A p of 0.02 decides one claim, and not one of many."""
    rows.add("tfmq", -2.0, noise=0.05)
    rows.add("qdiffusion", -1.97, noise=0.05)
    p = rows.judges["emoji-ldm4"].compare(RANKED_BY.name, "tfmq", "qdiffusion", "w4a8").estimate.p
    assert 0.001 < p < 0.04
    claim = Claim("first", "us", "tfmq", "qdiffusion")
    many = [claim, *(Claim(f"other {index}", "us", "tfmq", "qdiffusion") for index in range(int(0.05 / p) + 1))]
    assert "Of 1 comparisons: 1 confirmed" in show(rows, [claim])
    assert "0 confirmed" in show(rows, many)


def test_temporal_errors_are_judged_over_seeds(rows):
    for seed in range(3):
        rows.add("tfmq", -2.0, seed=seed, temporal=1e-4 * (1 + 0.01 * seed))
        rows.add("prev", -2.0, seed=seed, temporal=3e-4 * (1 + 0.02 * seed))
    (row,) = lines(show(rows, [Claim("first", "us", "tfmq", "prev", "temporal_error")]), "### emoji-ldm4: confirmed")
    assert row[3] == "Temporal error" and row[6].startswith("0.33 [")


def test_a_higher_metric_is_better_the_other_way_round(rows):
    rows.add("tfmq", -2.0, noise=0.01)
    rows.add("qdiffusion", -1.9, noise=0.01)
    (row,) = lines(show(rows, [Claim("it", "us", "tfmq", "qdiffusion", "psnr")]), "### emoji-ldm4: confirmed")
    # 20 log10 of the ratio of amplitudes.
    assert float(row[6].split()[0]) == pytest.approx(0.1 * 20 / np.log(10), abs=0.05)


def test_what_was_not_measured_has_no_verdict(rows):
    assert "No two rows of a claim have been measured yet." in page([], {}, metrics())
    rows.add("tfmq", -2.0)
    assert "No two rows of a claim have been measured yet." in show(rows, findings.CLAIMS)
    assert "small models" in show(rows, findings.CLAIMS) and "small models" not in show(rows, [], small=False)


def test_what_rounds_have_decided_stands_beside_or_in_place_of_what_was_measured(rows):
    rows.add("tfmq", -2.0, noise=1.0, task="one")
    rows.add("qdiffusion", -1.9, noise=1.0, task="one")
    claims = [Claim("first", "us", "tfmq", "qdiffusion"), Claim("second", "us", "tfmq", "ptqd")]
    first, second = claims
    drawn = {
        "one": [Drawn(first, "w4a8", "confirmed", 500, "p 0.013"), Drawn(second, "w8a8", "equal", 4000, "within 5%")],
        "two": [Drawn(first, "w4a8", "contradicted", 250, "p < 0.001")],
        "three": [],
    }
    text = show(rows, claims, drawn=drawn)
    assert "| Claim | By | one | two |" in text and "- **in rounds**: decided by" in text
    assert {row[0]: row[2:] for row in lines(text, "## Verdicts")} == {
        "first": [
            "open w4a8; **confirmed** w4a8 in rounds (500 images, p 0.013)",
            "**contradicted** w4a8 in rounds (250 images, p < 0.001)",
        ],
        "second": ["**equal** w8a8 in rounds (4,000 images, within 5%)", "–"],
    }
    alone = page([], {}, metrics(), claims, small=False, drawn={"two": drawn["two"]})
    assert lines(alone, "## Verdicts") == [["first", "us", "**contradicted** w4a8 in rounds (250 images, p < 0.001)"]]


def test_a_page_without_rounds_does_not_know_of_them(rows):
    rows.add("tfmq", -2.0, noise=0.01)
    rows.add("qdiffusion", -1.9, noise=0.01)
    claims = [Claim("first", "us", "tfmq", "qdiffusion")]
    text = show(rows, claims)
    assert text == show(rows, claims, drawn={}) == show(rows, claims, drawn={"emoji-ldm4": []})
    assert "in rounds" not in text and text.startswith(findings.INTRODUCTION.format(equal="") + findings.SMALL)


def test_every_claim_is_about_rows_and_metrics_that_exist():
    rows = set(discover.names(discover.METHODS))
    for claim in findings.CLAIMS:
        for row in (claim.better, claim.worse):
            method, _, others = row.partition("-")
            assert method in rows and others in ("", "published", "deployable-executed"), claim
        assert claim.metric == RANKED_BY.name or metrics()[claim.metric].better, claim
    assert len(set(findings.CLAIMS)) == len(findings.CLAIMS)
