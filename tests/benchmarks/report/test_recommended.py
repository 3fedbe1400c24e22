"""Where the recommended recipe stands: rows that it is ahead of, level with and behind, and their sizes."""

from __future__ import annotations

import dataclasses

from benchmarks.report import recommended

RIVALS = ("tfmq", "qdiffusion", "svdquant", "nearest")


def sized(rows, row, level, size, **changes):
    """Add a row with a network of so many MiB."""
    cost = dataclasses.replace(rows.make_record().cost, size_mib=size)
    rows.add(row, level, noise=0.05, cost=cost, **changes)


def test_rows_are_told_apart_and_sizes_are_said(rows):
    sized(rows, "recommended", -2.0, 2.0)
    sized(rows, "tfmq", -1.5, 2.0)
    sized(rows, "qdiffusion", -2.0, 2.2)
    sized(rows, "svdquant", -2.5, 3.6)
    sized(rows, "recommended", -2.0, 2.0, task="two")
    sized(rows, "tfmq", -1.5, 2.0, task="two")
    text = recommended.text(rows.judges, RIVALS)
    one, two = ([part.strip() for part in line.split("|")[1:-1]] for line in text.splitlines()[-2:])
    assert one[:3] == ["w4a8", "emoji-ldm4", "1 of 3"], "a row that is not measured does not count"
    assert one[3].startswith("Q-Diffusion 1.0") and one[3].endswith("1.10 times its size")
    assert one[4].startswith("SVDQuant 0.6") and one[4].endswith("1.80 times its size")
    assert one[5] == "not of Q-Diffusion" and two[2:] == ["1 of 1", "–", "–", "yes"]
    assert "ahead of every other row on 1 of 2 tasks (two)" in text


def test_without_the_recipe_there_is_nothing_to_say(rows):
    sized(rows, "tfmq", -1.5, 2.0)
    sized(rows, "recommended", -2.0, 2.0, task="alone")
    assert recommended.text(rows.judges, RIVALS) == ""
