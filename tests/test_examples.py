"""The examples, and those of the pages in docs/, run as they stand."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.suite import discover
from tests.tfmq import networks
from tfmq import load_quantized, read_metadata

ROOT = Path(__file__).parents[1]
TINY = ("--tiny", "--steps", "3", "--images", "4", "--iterations", "2")


def test_quantise_your_pipeline(tmp_path):
    command = [sys.executable, ROOT / "examples" / "quantise_your_pipeline.py", *TINY]
    command += ["--output", "q.safetensors", "--workspace", "kept"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    passes = ["weight ranges", "temporal reconstruction", "block reconstruction", "finite set calibration"]
    assert [line[:24].rstrip() for line in lines[:5]] == [*passes, "activation ranges"]
    assert re.fullmatch(r"q.safetensors: 0\.\d\d MiB, \d+ layers", lines[5])
    assert lines[6:] == ["q.png: drawn with it"]
    assert load_quantized(tmp_path / "q.safetensors").config.sample_size == 8
    assert "BlockReconstruction" in read_metadata(tmp_path / "q.safetensors")["recipe"]
    assert Image.open(tmp_path / "q.png").size == (32, 32)
    assert len(list((tmp_path / "kept").glob("*.safetensors"))) > 5


@pytest.fixture
def script(monkeypatch, tmp_path, capsys):
    """Run an example in this process, in a folder of its own; returns the lines of both streams."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments: str) -> tuple[list[str], list[str]]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
        return tuple(stream.splitlines() for stream in capsys.readouterr())

    yield run
    sys.modules.pop("common", None)


def test_compare_two_methods(script, tmp_path):
    (head, *rows, last), _ = script(
        "compare_two_methods", *TINY, "--methods", "nearest", "ptqd", "--picture", "out.png"
    )
    assert re.split(r"\s{2,}", head) == ["method", "noise error", "MiB", "seconds"]
    assert [re.split(r"\s{2,}", row)[0] for row in rows] == ["Round-to-nearest", "PTQD"]
    for row in rows:
        error, size, seconds = (float(value) for value in row.split()[-3:])
        assert 0 < error < 1 and 0 < size < 1 and seconds >= 0
    assert last.startswith("out.png: ")
    assert Image.open(tmp_path / "out.png").size == (4 * 32, 3 * 32)


def test_a_method_that_does_not_apply_says_why(script):
    (_, row), _ = script("compare_two_methods", *TINY, "--methods", "qdiffusion", "--precision", "w4a4")
    assert row.startswith("Q-Diffusion             does not apply: reported to fail below 8-bit activations")


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("quantise_your_pipeline", ["nowhere"], "there is no folder nowhere: run `dvc pull data.dvc`"),
        ("compare_two_methods", ["--tiny", "--methods", "nearst"], "invalid choice: 'nearst'"),
    ],
)
def test_a_bad_argument_is_one_clear_line(script, tmp_path, capsys, name, arguments, message):
    with pytest.raises(SystemExit) as ended:
        script(name, *arguments)
    assert ended.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--precision", "w4a"], "argument --precision: "),
        (["--precision", "w32a8"], "w32a8 leaves the weights in full precision"),
        (["--steps", "0"], "'0' is not a whole number of at least 1"),
    ],
)
def test_values_that_make_no_sense_are_refused(script, capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        script("compare_two_methods", "--tiny", *arguments)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def blocks(page: str) -> list[str]:
    """The Python blocks of a page."""
    return re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.M | re.S)


def test_the_page_on_prompts(tmp_path, monkeypatch):
    (code,) = blocks("quantise.md")
    discover.family("stable_diffusion").save_tiny(tmp_path / "data" / "emoji-text", 0)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(re.sub(r"steps=20\b", "steps=3", code), names)
    assert names["image"].size == (32, 32) and not any(row.reason for row in names["report"].coverage)


def test_the_page_on_passes():
    recipe, own = blocks("passes.md")
    names: dict[str, object] = {}
    exec(recipe, names)
    exec(own.replace("from __future__", "#"), names)
    unet, _, _, report = networks.quantized(names["round_to_nearest"], "w8a8")
    assert list(report.seconds) == ["weight ranges", "round to nearest", "activation ranges"]
    ranges, *rest = names["round_to_nearest"]
    narrower, *_ = networks.quantized((ranges, names["ShrinkRanges"](0.5), *rest), "w8a8")
    assert torch.allclose(2 * narrower.conv_in.weight_scale, unet.conv_in.weight_scale)


def test_the_page_on_passes_has_them_all():
    import tfmq

    passes = {
        name for name in tfmq.__all__ if isinstance(part := getattr(tfmq, name), type) and issubclass(part, tfmq.Pass)
    }
    listed = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "passes.md").read_text(encoding="utf-8"), re.M)
    assert sorted(listed) == sorted(passes - {"Pass"})
