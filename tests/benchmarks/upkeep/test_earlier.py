"""Work against an earlier version: shares are of runs whose error is reached, and a commit that is missing is named."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

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
    assert earlier.main(["--task", "emoji-dit"]) == 1
    assert "emoji-dit has no unet" in capsys.readouterr().err


def test_both_versions_are_measured_on_the_same_pool(suite, monkeypatch, capsys):
    known = ["git", "-C", str(earlier.ROOT), "cat-file", "-e", earlier.COMMIT]
    if subprocess.run(known, capture_output=True, check=False).returncode:
        pytest.skip(f"the history of this clone does not reach {earlier.COMMIT}")
    monkeypatch.setattr(earlier, "IMAGES", 2)
    monkeypatch.setattr(earlier, "VARIANTS", ({"rows": 8, "range_images": 2}, {"rows": 8, "range_images": 2}))
    document = yaml.safe_load(Path("params.yaml").read_text())
    document["methods"] |= {"recommended": {}}
    Path("params.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    assert earlier.main(["--task", "toy", "--iterations", "2"]) == 0
    lines = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [line[0].strip() for line in lines] == [
        "TFMQ-DM then, 2 iterations",
        "Recommended, rows 8, range_images 2",
    ], "the same recipe is measured once"
    then, now = (float(line[1]) for line in lines)
    assert 0.5 < then / now < 2, "errors of one network at one precision"
