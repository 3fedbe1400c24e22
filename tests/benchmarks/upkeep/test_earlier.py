"""Work against an earlier version: shares are of runs whose error is reached, and a commit that is missing is named."""

from __future__ import annotations

import pytest

from benchmarks.upkeep import earlier
from benchmarks.upkeep.earlier import Measured


def test_a_share_is_given_where_the_error_is_reached():
    then = [
        Measured("TFMQ-DM then, 400 iterations", 200.0, 0.04),
        Measured("TFMQ-DM then, 1600 iterations", 800.0, 0.03),
    ]
    now = [Measured("cheap", 16.0, 0.039), Measured("good", 40.0, 0.03)]
    lines = [line.split("|")[1:-1] for line in earlier.page("toy", "w4a8", then, now).splitlines()[4:]]
    shares = {cells[0].strip(): [cell.strip() for cell in cells[3:]] for cells in lines}
    assert shares["cheap"] == ["8.0%", ""] and shares["good"] == ["20.0%", "5.0%"]
    assert shares["TFMQ-DM then, 1600 iterations"] == ["400.0%", ""]


def test_a_commit_that_is_missing_is_named(tmp_path, capsys):
    with pytest.raises(ValueError, match="git archive 0000000.*Give a commit of this repository"):
        earlier.unpack("0000000", tmp_path)
    assert earlier.main(["--task", "emoji-ldm5"]) == 1
    assert "did you mean 'emoji-ldm8'" in capsys.readouterr().err
