"""The GPU check on tiny networks of the CPU, and what planning makes of what it finds."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from benchmarks.planning import devices
from benchmarks.planning.devices import DONE, FAILED, LATE, Device, Part, load, rate_on
from benchmarks.planning.planner import LEARNED_ON_GPU, Rate
from benchmarks.runtime import environment
from benchmarks.upkeep import gpu_check, gpu_parts
from benchmarks.upkeep.gpu_check import PARTS, check, run_apart, run_part
from tfmq.modules.integer_products import cpu_is_exact

CPU = torch.device("cpu")
RATE = Rate("a CPU", rows=1, seconds=9.0, operations=3 * 10**12)
SPEEDS = [
    ("UNet2DModel", "float32", 30.0, 40.0),
    ("UNet2DModel", "simulated", 10.0, 13.3),
    ("UNet2DModel", "TF32", 60.0, 80.0),
    ("UNet2DConditionModel", "float32", 5.0, 20.0),
]


def device(learned=5.0) -> Device:
    names = ("network", "arithmetic", "samples_per_second", "teraflops")
    speeds = [dict(zip(names, each, strict=True)) | {"rows": 50} for each in SPEEDS]
    parts = (
        Part("speed", DONE, 1.0, "", {"speeds": speeds}),
        Part("learning", DONE if learned else FAILED, 1.0, "", {"evaluations_a_learned_row": learned}),
    )
    return Device("card", "NVIDIA Card", False, {}, parts)


@pytest.mark.skipif(not cpu_is_exact(), reason="the 8-bit kernels of this processor are not exact")
def test_all_parts_run_on_tiny_networks_and_find_what_they_say(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_parts, "ROUNDS", 1)
    for name, (do, _) in list(PARTS.items()):
        monkeypatch.setitem(PARTS, name, (do, 3600))  # on a slow machine too
    found = check(CPU, True, list(PARTS), tmp_path, run_part)
    assert [(part.name, part.status, part.error) for part in found.parts] == [(name, DONE, "") for name in PARTS]
    written = json.loads((tmp_path / "cpu-tiny.json").read_text())
    assert written["device"] == "cpu" and [part["name"] for part in written["parts"]] == list(PARTS)
    agreement = found.found("agreement")
    network = agreement["networks"]["toy"]
    assert agreement["largest_exact_tf32_sum"] == 2**24, "float32 on a CPU"
    assert network["layers"] > 20 and 0 < network["layer_most_off"] < gpu_parts.MOST_OFF
    assert network["int8_not_exact"] == network["tf32_not_exact"] == []
    assert network["executed_from_simulated"] < network["simulated_from_full_precision"]
    assert [each.arithmetic for each in found.speeds] == ["float32", "TF32", "simulated", "executed"]
    assert all(each.samples_per_second > 0 and each.share_of_peak is None for each in found.speeds)
    learning = found.found("learning")
    assert learning["seconds"]["block reconstruction"] > 0 and found.learned > 0
    assert learning["planned_memory_mib"] > 0
    assert len(found.found("smoke")["cells"]) == 4 and all("measured" in each for each in found.found("smoke")["cells"])
    assert found.found("shards")["compared"] == ["checkpoint", "toy/full_precision/w32a32", "toy/tfmq/w4a8"]
    with pytest.raises(ValueError, match="tiny networks, whose speed says nothing"):
        load("cpu-tiny", tmp_path)


def test_a_part_that_fails_is_told_and_the_others_go_on(tmp_path, monkeypatch):
    def broken(given):
        raise ExceptionGroup("all", [RuntimeError("CUDA error:\nno kernel image")])

    monkeypatch.setitem(PARTS, "agreement", (broken, 60))
    monkeypatch.setitem(PARTS, "speed", (lambda given: {"wrong": ["layer 3 is off"]}, 60))
    monkeypatch.setitem(PARTS, "learning", (lambda given: {"value": 1}, 60))
    found = check(CPU, True, ["agreement", "speed", "learning"], tmp_path, run_part)
    assert [(part.status, part.error) for part in found.parts] == [
        (FAILED, "RuntimeError: CUDA error: no kernel image"),
        (FAILED, "layer 3 is off"),
        (DONE, ""),
    ]


def test_parts_that_are_not_run_stay_if_they_are_of_the_same_code(tmp_path, monkeypatch, capsys):
    versions = {"torch": "2.11"}
    of = {"versions": versions, "commit": "a1", "modified": False, "gpu": None}
    monkeypatch.setattr(environment, "describe", lambda device: dict(of))

    def parts(*names):
        """Run these parts; gives the seconds of each part that the file then has, by name."""
        runs.append(names)
        check(CPU, True, list(names), tmp_path, lambda name, *_: Part(name, DONE, float(len(runs))))
        return {part["name"]: part["seconds"] for part in json.loads((tmp_path / "cpu-tiny.json").read_text())["parts"]}

    runs = []
    assert parts("speed", "learning") == {"speed": 1, "learning": 1}
    of["threads"] = 8
    assert list(parts("agreement").items()) == [("agreement", 2), ("speed", 1), ("learning", 1)], "in their order"
    assert parts("learning") == {"agreement": 2, "speed": 1, "learning": 3}
    assert "anew" not in capsys.readouterr().out
    for name, value in (("commit", "b2"), ("versions", {"torch": "2.12"}), ("gpu", "another")):
        of[name] = value
        assert parts("speed") == {"speed": len(runs)}
        said = f"cpu-tiny.json is begun anew, without its other parts: other {name}\n"
        assert said in capsys.readouterr().out
        parts("learning")
    of["modified"] = True
    assert parts("smoke") == {"smoke": len(runs)}
    assert "without its other parts: code that no commit has" in capsys.readouterr().out
    assert parts("speed") == {"speed": len(runs)}, "two states of the code that no commit names"
    (tmp_path / "cpu-tiny.json").write_text("{")
    assert parts("speed") == {"speed": len(runs)}
    assert "cpu-tiny.json cannot be read and is begun anew" in capsys.readouterr().out


def test_a_part_in_its_own_process_is_ended_after_its_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_apart("speed", CPU, True, 0.05).status == LATE
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho 'Segmentation fault' >&2\nexit 139\n")
    script.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(script))
    found = run_apart("speed", CPU, True, 60.0)
    assert (found.status, found.error) == (FAILED, "the process ended with code 139: Segmentation fault")


def test_without_a_gpu_it_says_so_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == gpu_check.NO_GPU
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path):
    (tmp_path / "devices").touch()
    parts = []
    with pytest.raises(OSError, match="devices"):
        check(CPU, True, ["speed"], tmp_path / "devices", lambda *given: parts.append(given))
    assert not parts


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (PermissionError("results/devices: denied"), 1, "error: results/devices: denied"),
        (KeyboardInterrupt(), 130, "stopped; what the finished parts have found is kept"),
    ],
)
def test_what_ends_the_check_is_a_line(raised, code, line, capsys, monkeypatch):
    def ended(*_):
        raise raised

    monkeypatch.setattr(gpu_check, "check", ended)
    assert gpu_check.main(["--device", "cpu", "--tiny"]) == code
    assert capsys.readouterr().err == f"{line}\n"


def test_full_size_is_not_for_a_cpu(capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(["--device", "cpu"])
    assert "--device cpu needs --tiny" in capsys.readouterr().err


def test_what_was_measured_takes_the_place_of_what_is_assumed():
    found = rate_on(RATE, "UNet2DModel", device())
    assert found.planned == pytest.approx(3 / 40)
    assert (found.quantized, found.learned, found.tf32) == (pytest.approx(3.0), 5.0, pytest.approx(0.5))
    assert rate_on(RATE, "UNet2DConditionModel", device()).tf32 == 1, "not measured"
    assert rate_on(RATE, "DiTTransformer2DModel", device()).planned == pytest.approx(3 / 20), "the slowest is meant"
    assert rate_on(RATE, "UNet2DModel", device(learned=None)).learned == LEARNED_ON_GPU
    same = rate_on(dataclasses.replace(RATE, device="NVIDIA Card"), "UNet2DModel", device())
    assert same.planned == RATE.seconds and same.learned == 5.0, "the same device was timed"
    with pytest.raises(ValueError, match="no speed was measured of NVIDIA Card"):
        rate_on(RATE, "UNet2DModel", dataclasses.replace(device(), parts=()))


def test_a_device_is_found_by_its_file_and_by_what_it_calls_itself(tmp_path):
    with pytest.raises(ValueError, match="unknown device 'card'"):
        load("card", tmp_path)
    assert devices.of("NVIDIA Card", tmp_path) is None
    device().save(tmp_path)
    assert load("card", tmp_path) == devices.of("NVIDIA Card", tmp_path) == device()
    assert devices.of("another", tmp_path) is None
