"""A tiny suite in a folder of its own: random checkpoint, random evaluator, a handful of images."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from timm.models import create_model

from benchmarks import __main__ as command_line
from benchmarks.features.efficientnet_lite0 import weight_name
from benchmarks.models.ldm import FAMILY
from benchmarks.runtime import manifest
from benchmarks.small.data import Emoji, write_sheet, write_table
from benchmarks.suite.record import Record

PARAMS = {
    "name": "tiny",
    "tasks": {
        "toy": {
            "version": 1,
            "family": "ldm",
            "checkpoint": "data/toy",
            "dataset": "emoji",
            "data": "data/emoji",
            "resolution": 32,
            "scheduler": "ddim",
            "steps": 3,
            "eta": 0.5,
            "guidance_scale": 1.0,
            "images": 6,
            "batch": 2,
            "calibration_images": 4,
            "reference_images": 4,
            "evaluator": "efficientnet_lite0",
        }
    },
    "tables": {
        "leaderboard": {
            "protocol": "shared",
            "tasks": ["toy"],
            "precisions": ["w4a8", "w4a32"],
            "methods": ["nearest", "tfmq"],
        },
        "variants": {
            "protocol": "shared",
            "tasks": ["toy"],
            "precisions": ["w4a8"],
            "methods": ["temporal_feature_matters"],
            "beside": ["tfmq"],
        },
        "published": {
            "protocol": "published",
            "tasks": ["toy"],
            "precisions": ["w4a8"],
            "methods": ["tfmq", "nearest"],
            "beside": ["tfmq", "nearest"],
        },
    },
    "methods": {
        "nearest": {},
        "tfmq": {"iterations": 2, "temporal_iterations": 2},
        "temporal_feature_matters": {"iterations": 2, "temporal_iterations": 2},
    },
}


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny suite after the stages that come before all quantised cells."""
    folder = tmp_path_factory.mktemp("suite")
    FAMILY.save_tiny(folder / "data" / "toy", 0)
    emoji = folder / "data" / "emoji"
    emoji.mkdir()
    generator = torch.Generator().manual_seed(0)
    write_sheet(torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8, generator=generator), emoji / "sheet.webp")
    write_table([Emoji(i, f"emoji {i}", "Objects", "google", "train") for i in range(5)], emoji / "emoji.csv")
    weights = folder / "data" / "efficientnet-lite0" / "model.safetensors"
    weights.parent.mkdir()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = create_model("tf_efficientnet_lite0", pretrained=False)
    save_file({weight_name(name): tensor for name, tensor in network.state_dict().items()}, weights)
    manifest.write(weights.parent)
    (folder / "params.yaml").write_text(yaml.safe_dump(PARAMS, sort_keys=False))
    (folder / "README.md").write_text("# Toy\n\n<!-- leaderboard -->\n<!-- /leaderboard -->\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for stage in ("calibrate", "reference"):
            assert command_line.main([stage, "--task", "toy"]) == 0
        for stage in ("generate", "score"):
            assert command_line.main([stage, "--task", "toy", "--method", "full_precision", "--shards", "1"]) == 0
    return folder


@pytest.fixture
def suite(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh copy of the prepared suite, as the current folder."""
    folder = tmp_path / "suite"
    shutil.copytree(prepared, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    """Run one stage of the command line; returns its exit code and the lines it printed on standard error."""

    def stage(*arguments: str) -> tuple[int, list[str]]:
        capsys.readouterr()
        code = command_line.main(list(arguments))
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        return code, lines

    return stage


@pytest.fixture
def generate(run):
    """Generate a row of the toy task in this process; returns what ``run`` does."""

    def row(method: str, *precisions: str, table: str = "leaderboard") -> tuple[int, list[str]]:
        return run(*arguments("generate", method, *precisions, table=table))

    return row


@pytest.fixture
def score(run):
    """Score a row of the toy task in this process; returns its records by precision."""

    def row(method: str, *precisions: str, table: str = "leaderboard") -> dict[str, Record]:
        assert run(*arguments("score", method, *precisions, table=table)) == (0, [])
        folder = f"{method}-published" if table == "published" else method
        paths = Path("results/records/toy", folder).glob("*.json")
        return {path.stem: Record.from_json(path.read_text()) for path in paths}

    return row


def arguments(stage: str, method: str, *precisions: str, table: str = "leaderboard", shards: int = 1) -> list[str]:
    """The command line of a stage for a row, at all precisions of its table unless some are named."""
    named = ["--precision", *precisions] if precisions else []
    return [stage, "--task", "toy", "--method", method, "--table", table, "--shards", str(shards), *named]
