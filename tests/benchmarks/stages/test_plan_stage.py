"""What is planned is what the stages then take."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from diffusers.models.attention_processor import Attention
from torch import nn

from benchmarks import __main__ as command_line
from benchmarks.runtime import files
from benchmarks.sources.originals.architectures import ARCHITECTURES
from benchmarks.stages import plan
from benchmarks.suite import discover, params
from tests.tfmq import networks
from tfmq.network.backbone import evaluate


def read(text):
    """Rows of each table, by task and by step."""
    found, task = {}, ""
    for line in text.splitlines():
        if not line.startswith("|"):
            task = line.removeprefix("## ") or task
            continue
        row = [cell.strip() for cell in line.split("|")[1:-1]]
        rows = found.setdefault(task, [])
        rows.append(dict(zip(rows[0], row, strict=True)) if rows else row)
    return {task: {row["Step"]: row for row in rows[2:]} for task, rows in found.items()}


def count(text):
    return 0 if text == "–" else int(text.replace(",", ""))


def test_counts_are_those_of_the_records_and_sizes_those_of_the_files(suite, generate, score, capsys):
    assert command_line.main(["plan", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    rows = read(out)["toy"]
    pool = Path("work/calibration/toy/pool.safetensors").stat().st_size / 2**30
    assert float(rows["calibrate"]["Disk (GiB)"].replace("–", "0")) == pytest.approx(pool, abs=0.01)
    assert count(rows["calibrate"]["Pool"]) == 3 * 4 and count(rows["reference"]["Reference"]) == 3 * 4
    assert rows["nearest-published/w4a8"]["Note"] == "not applicable"
    for method in ("nearest", "tfmq"):
        assert generate(method, "w4a8") == (0, [])
        cost = score(method, "w4a8")["w4a8"].cost
        row = rows[f"{method}/w4a8"]
        planned = count(rows["calibrate"]["Pool"]) + count(row["Quantising"])
        assert (planned, count(row["Optimiser steps"])) == (cost.unet_evaluations, cost.optimizer_steps)
    assert "s on one thread of a CPU, 1 at once" in out
    assert command_line.main(["plan", "--device", "cpu", "--teraflops", "0.5"]) == 0
    assert "(0.5 TFLOP/s); it took" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "--teraflops", "1", "--like", "card"], "--like: not allowed with argument --teraflops"),
        (["plan", "--teraflops", "fast"], "--teraflops: fast is not a positive number"),
        (["calibrate", "--task", "toy", "--shards", "two"], "--shards: two is not a whole number of at least 1"),
    ],
)
def test_numbers_on_the_command_line_are_checked(arguments, message, capsys):
    with pytest.raises(SystemExit):
        command_line.main(arguments)
    assert message in capsys.readouterr().err


FAMILIES = {"dit": "ddim", "stable_diffusion_xl": "euler"}


@pytest.fixture(params=FAMILIES)
def with_another(suite, request):
    """The tiny suite with a second task: of a diffusion transformer, or of a UNet that takes further inputs."""
    discover.family(request.param).save_tiny(Path("data/classes"), 0)
    document = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    changes = {"family": request.param, "checkpoint": "data/classes", "prompts": "prompts", "guidance_scale": 3.0}
    changes |= {"scheduler": FAMILIES[request.param], "eta": 0.0}
    document["tasks"]["classes"] = document["tasks"]["toy"] | changes
    document["tables"]["leaderboard"]["tasks"].append("classes")
    Path("params.yaml").write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")


def test_other_networks_are_planned_alike(with_another, capsys):
    assert command_line.main(["plan", "--device", "cpu", "--task", "classes"]) == 0
    out = capsys.readouterr().out
    rows = read(out)["classes"]
    assert count(rows["calibrate"]["Pool"]) == 2 * 3 * 4, "two evaluations for each image and step, by guidance"
    for name in ("nearest/w4a8", "tfmq/w4a8"):
        assert count(rows[name]["Quantising"]) > 0 and rows[name]["Memory (GiB)"] != "?"
    stored = sum(path.stat().st_size for path in Path("data/classes").rglob("*") if path.is_file())
    assert plan.describe(params.load(Path("params.yaml")).tasks["classes"]).stored == stored
    assert "s on one thread of a CPU, 1 at once" in out


def test_other_networks_can_be_rehearsed(with_another, run):
    arguments = ("rehearse", "--task", "classes", "--table", "leaderboard", "--method", "nearest")
    assert run(*arguments, "--set", "images=1", "steps=2") == (0, [])
    found = files.read_json(Path("results/rehearsals/classes-nearest-w4a8.json"))
    assert found["effort"]["unet_evaluations"] == 2 * 2 and 0 < found["relative_error"] < 1


def test_cells_of_some_methods_are_planned_alone(suite, run, capsys):
    assert command_line.main(["plan", "--device", "cpu", "--method", "nearest"]) == 0
    steps = read(capsys.readouterr().out)["toy"]
    assert "full_precision" in steps and "calibrate" in steps
    cells = {name for name in steps if "/" in name}
    assert cells == {"nearest/w4a8", "nearest/w4a32", "nearest-published/w4a8"}
    code, (line,) = run("plan", "--method", "nearst")
    assert code == 1 and line.startswith("error: unknown method 'nearst': did you mean 'nearest'?")


@pytest.mark.parametrize("kind", ["unconditional", "text"])
def test_operations_are_those_of_the_layers_by_hand(kind):
    unet, tokens, counted = networks.KINDS[kind].build(), 5, []

    def count(layer, arguments, output):
        if isinstance(layer, nn.Conv2d | nn.Linear):  # each number that comes out is a product of two vectors
            counted.append(2 * output.numel() * layer.weight[0].numel())
        elif isinstance(layer, Attention):  # and so is each score, and each number of the values' means
            pixels = output.flatten(2).shape[-1] if output.dim() == 4 else output.shape[1]
            cross = layer.to_k.in_features == 12
            counted.append(4 * pixels * (tokens if cross else pixels) * layer.inner_dim)

    for module in unet.modules():
        module.register_forward_hook(count)
    with torch.no_grad():
        evaluate(unet, *plan.random_inputs(unet, tokens, 1))
    described = plan.Described({**unet.config, "_class_name": type(unet).__name__}, {}, tokens, 0)
    assert plan._time(described, torch.device("cpu"), 2).operations == sum(counted)


def test_errors_are_one_line(suite, run):
    assert run("plan", "--task", "toi")[1][0].startswith("error: unknown task 'toi': did you mean 'toy'?")
    Path("data/toy/unet/config.json").unlink()
    code, lines = run("plan", "--task", "toy")
    assert code == 1 and lines == ["error: data/toy is missing, and no architecture is known of toy: run `dvc pull`"]


def test_a_checkpoint_that_is_not_there_is_planned_from_its_architecture(root, tmp_path, monkeypatch):
    """Without the timing, for which a full-size network would have to be built."""
    monkeypatch.chdir(tmp_path)
    document = yaml.safe_load((root / "benchmarks/paper/params.yaml").read_text(encoding="utf-8"))
    suite = params.parse(document)
    described = plan.describe(suite.tasks["coco-sd-v1-4"])
    unet = plan.build(described.unet, torch.device("meta"))
    assert sum(parameter.numel() for parameter in unet.parameters()) == 859_520_964
    assert described.tokens == 77 and described.stored > 4 * 859_520_964
    assert len(plan.timesteps_of(suite.tasks["coco-sd-v1-4"], described)) == 51
    larger = plan.describe(suite.tasks["coco-sdxl"])
    unet = plan.build(larger.unet, torch.device("meta"))
    assert sum(parameter.numel() for parameter in unet.parameters()) == 2_567_463_684
    assert larger.tokens == 77 and larger.stored == pytest.approx(6.938e9, rel=1e-3)
    timesteps = plan.timesteps_of(suite.tasks["coco-sdxl"], larger)
    assert len(timesteps) == 50 and timesteps.dtype == torch.int64 and timesteps[:2].tolist() == [981, 961]
    evaluate(unet, *plan.random_inputs(unet, larger.tokens, 2))
    churches = plan.describe(suite.tasks["lsun-churches-ldm8"])
    assert churches.unet["attention_heads"] == ARCHITECTURES["ldm8-churches"].full.heads
    modules = plan.build(churches.unet, torch.device("meta")).modules()
    assert {module.heads for module in modules if isinstance(module, Attention)} == {8}


def test_downloads_have_their_published_size_or_that_of_their_tensors(root, monkeypatch):
    monkeypatch.chdir(root / "benchmarks/paper")
    (given,) = plan._downloads(["coco-sd-v1-4"])
    (shaped,) = plan._downloads(["lsun-bedrooms-ldm4"])
    assert given.disk == 4_265_380_512
    keys = root.parent / "shared/reference/checkpoints/ldm4_lsun_bedrooms.keys.json"
    if not keys.exists():
        pytest.skip(f"{keys} is not here")
    shapes = [entry["shape"] for entry in json.loads(keys.read_text())["keys"].values()]
    assert shaped.disk == pytest.approx(4 * sum(math.prod(shape) for shape in shapes), rel=1e-4)
