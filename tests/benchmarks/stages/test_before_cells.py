"""Calibration pools and reference features are the same however many processes share the work."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from benchmarks.runtime import files
from benchmarks.stages import reference


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != files.COST}


def test_one_process_and_two_give_identical_bytes(suite, run):
    folders = {"calibrate": files.calibration("toy"), "reference": files.reference("toy")}
    for stage, folder in folders.items():
        found = []
        for shards in ("1", "2"):
            assert run(stage, "--task", "toy", "--shards", shards) == (0, [])
            found.append(contents(folder))
        assert found[0] == found[1] and found[0]
    assert len(load_file(folders["reference"] / reference.FEATURES)["pooled"]) == 4


def test_samples_that_cannot_be_made_leave_the_reference_as_it_was(suite, run):
    before = contents(files.reference("toy"))
    Path("data/toy/unet/config.json").unlink()
    code, lines = run("reference", "--task", "toy", "--shards", "2")
    assert code == 1 and len(lines) == 1 and "config.json is missing" in lines[0]
    assert contents(files.reference("toy")) == before
