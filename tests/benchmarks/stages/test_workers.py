"""Units of work for one process or many."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from benchmarks.stages.workers import default_shards, run_units

CPU = torch.device("cpu")


def do(unit: tuple[str, Path]) -> None:
    name, folder = unit
    if name == "bad":
        raise ValueError("a bad unit")
    if name == "killed":
        os._exit(1)
    (folder / name).write_text(f"{os.getpid()} {torch.get_num_threads()}")
    time.sleep(0.2)


def then(unit: tuple[str, Path]) -> list[tuple[str, Path]]:
    name, folder = unit
    return [(name + "+", folder)] if name in ("a", "bad") else []


@pytest.mark.parametrize("shards", [1, 2])
def test_all_units_are_done_and_what_follows_them_but_for_those_that_raise(tmp_path, shards):
    failures = run_units([(name, tmp_path) for name in ("a", "bad", "b")], do, shards, CPU, then=then)
    assert [(unit[0], str(error)) for unit, error in failures] == [("bad", "a bad unit")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a+", "b"]
    found = [path.read_text().split() for path in tmp_path.iterdir()]
    assert {threads for _, threads in found} == {"1"}
    assert ({int(process) for process, _ in found} == {os.getpid()}) == (shards == 1)


def test_a_process_that_dies_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="a worker process died.*--shards 1"):
        run_units([("killed", tmp_path)], do, 2, CPU)


def test_a_gpu_has_one_process():
    assert default_shards(torch.device("cuda")) == 1 <= default_shards(CPU)
