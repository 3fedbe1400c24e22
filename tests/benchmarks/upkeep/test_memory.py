"""Rows whose memory is planned and measured: each can be planned, and one is measured on a small network."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from benchmarks.upkeep import memory
from benchmarks.upkeep.memory import ROWS, Memory

CPU = torch.device("cpu")


@pytest.fixture
def smaller(monkeypatch):
    """A row on a small network, with hardly any images."""
    monkeypatch.setattr(memory, "IMAGES", 1)
    network = ROWS["svdquant"].network | {"sample_size": 8, "block_out_channels": (32, 32, 64)}
    settings = ROWS["svdquant"].settings | {"images": 1, "steps": 1, "search_rows": 1}
    return dataclasses.replace(ROWS["svdquant"], network=network, settings=settings)


def test_rows_are_of_networks_that_a_process_takes_little_beside():
    for row in ROWS.values():
        unet = memory.build(row.network, torch.device("meta"))
        assert 50e6 < sum(parameter.numel() for parameter in unet.parameters()) < 100e6


def test_a_row_is_planned_and_measured(smaller):
    found = memory.measure(smaller, CPU)
    weights = sum(parameter.nbytes for parameter in memory.build(smaller.network, torch.device("meta")).parameters())
    assert found.planned > 2 * weights and found.measured >= 0


def test_a_row_that_does_not_say_what_it_holds_is_named(smaller, monkeypatch):
    monkeypatch.setattr(memory, "plan_cost", lambda *arguments: SimpleNamespace(held=None))
    with pytest.raises(ValueError, match="svdquant does not say what it holds"):
        memory.measure(smaller, CPU)


@pytest.mark.parametrize(("planned", "agrees"), [(74, False), (76, True), (124, True), (126, False)])
def test_planned_may_be_a_quarter_off(planned, agrees):
    assert Memory(planned, 100).agrees is agrees


def test_the_table_has_a_line_a_row():
    found = {"tfmq": Memory(1100 * 2**20, 1000 * 2**20), "svdquant": Memory(2**20, 2**21)}
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in memory.table(found).splitlines()]
    assert lines[0] == ["Row", "Planned (MiB)", "Measured (MiB)", "Planned / measured"]
    assert lines[2:] == [["tfmq, w4a8", "1,100", "1,000", "1.10"], ["svdquant, w4a4", "1", "2", "0.50"]]
