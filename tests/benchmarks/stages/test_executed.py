"""Cells that are executed in integers: made and shown beside the simulated ones, or refused with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from benchmarks.runtime import excerpt, files
from benchmarks.stages import _units
from benchmarks.suite.record import Cell, Record
from tests.benchmarks.tiny_suite import arguments
from tfmq.checkpoint import load_quantized
from tfmq.execution import executing
from tfmq.modules.integer_products import cpu_is_exact
from tfmq.network.backbone import evaluate

pytestmark = pytest.mark.skipif(not cpu_is_exact(), reason="the 8-bit kernels of this processor are not exact")

TABLE = {
    "protocol": "deployable",
    "backend": "executed",
    "tasks": ["toy"],
    "precisions": ["w4a8"],
    "methods": ["nearest"],
    "beside": ["nearest"],
}
CELL = Cell("toy", "nearest", "w4a8", protocol="deployable", backend="executed")
SIMULATED = Cell("toy", "nearest", "w4a8")


@pytest.fixture
def deployed(suite):
    """Gives the tiny suite a table of executed cells."""

    def change(**changes: object) -> None:
        document = yaml.safe_load(Path("params.yaml").read_text())
        table = TABLE | changes
        document["tables"]["deployed"] = table
        document["methods"] |= {method: document["methods"].get(method, {}) for method in table["methods"]}
        Path("params.yaml").write_text(yaml.safe_dump(document, sort_keys=False))

    return change


@pytest.fixture
def make(run):
    """Generate and score a row; returns what generating printed."""

    def row(method: str, *precisions: str, table: str = "deployed") -> tuple[int, list[str]]:
        made = run(*arguments("generate", method, *precisions, table=table))
        if made[0] == 0:
            assert run(*arguments("score", method, *precisions, table=table)) == (0, [])
        return made

    return row


def test_an_executed_cell_stands_beside_the_simulated_one(deployed, make, run):
    deployed()
    assert make("nearest", "w4a8", table="leaderboard") == (0, [])
    simulated = {path: path.read_bytes() for path in files.cell_folder(SIMULATED).rglob("*.*")}
    assert make("nearest") == (0, [])
    assert simulated == {path: path.read_bytes() for path in files.cell_folder(SIMULATED).rglob("*.*")}
    record, other = (Record.load(files.record_file(cell)) for cell in (CELL, SIMULATED))
    assert (record.cell, record.status, record.cost.execution) == (CELL, "measured", "executed")
    assert (other.cell, other.cost.execution) == (SIMULATED, "simulated")
    assert record.inputs["images"] != other.inputs["images"]
    assert run("tables") == (0, [])
    section = Path("results/README.md").read_text().split("## Deployed")[1].split("\n## ")[0]
    (line,) = [line for line in section.splitlines() if line.startswith("| w4a8")]
    values = [excerpt.read(cell).values["feature_distance"] for cell in (CELL, SIMULATED)]
    fields = [field.strip() for field in line.split("|")]
    assert fields[3:5] == [f"{found.mean():.4f}" for found in reversed(values)]
    assert fields[5].startswith(f"{(values[0] - values[1]).mean():z.4f} [")
    assert "Round-to-nearest (deployable, executed)" in Path("results/COVERAGE.md").read_text()


def test_its_errors_are_those_of_the_network_in_integers(deployed, make):
    deployed()
    make("nearest")
    folder = files.cell_folder(CELL)
    network = load_quantized(folder / files.QUANTIZED)
    trajectory = load_file("work/cells/toy/full_precision/w32a32/trajectory.safetensors")
    found = load_file(folder / files.ERRORS)["trajectory"]

    def errors(unet) -> torch.Tensor:
        given = zip(trajectory["latents"], trajectory["timesteps"], trajectory["noise"], strict=True)
        apart = [(evaluate(unet, latents, step, None) - noise, noise) for latents, step, noise in given]
        return torch.stack([d.flatten(1).norm(dim=1) / noise.flatten(1).norm(dim=1) for d, noise in apart], 1)

    with torch.no_grad():
        assert torch.equal(errors(executing(network)), found)
        assert not torch.equal(errors(network), found)


@pytest.mark.parametrize(
    ("method", "precision", "protocol", "reason"),
    [
        ("nearest", "w4a32", "shared", "its weight or its input is not quantised"),
        ("groupwise", "w8a8", "shared", "the range of its input is dynamic"),
        ("svdquant", "w8a8", "shared", "the range of its input is dynamic"),
        ("svdquant", "w8a8", "deployable", "integer kernels do not execute its grids"),
    ],
)
def test_what_cannot_be_executed_is_not_applicable(deployed, make, monkeypatch, method, precision, protocol, reason):
    """Before anything is quantised, which can take hours."""
    deployed(methods=[method], precisions=[precision], protocol=protocol, beside=[])
    monkeypatch.setattr(_units, "quantize_", None)
    assert make(method) == (0, [])
    cell = Cell("toy", method, precision, protocol=protocol, backend="executed")
    record = Record.load(files.record_file(cell))
    assert (record.cell, record.status, record.cost) == (cell, "not applicable", None)
    assert reason in record.reason


def test_another_processor_is_an_error_and_leaves_no_record(deployed, make, monkeypatch):
    deployed()
    monkeypatch.setattr("tfmq.execution.cpu_is_exact", lambda: False)
    code, (line,) = make("nearest")
    assert code == 1 and "VNNI instructions are missing" in line
    assert not files.cell_folder(CELL).exists()
