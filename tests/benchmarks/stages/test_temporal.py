"""Which time step a temporal feature is taken for, and where temporal features alone lead sampling."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks.runtime import files
from benchmarks.stages import temporal
from benchmarks.stages._setup import conditioning_of, draw_noise, load_model, sampling_settings
from benchmarks.stages._temporal_features import TabledSampling, nearest_steps, relative_error, sampled_steps
from benchmarks.suite import discover, params
from benchmarks.suite.record import Cell
from tests.tfmq import pipelines
from tfmq.checkpoint import load_quantized
from tfmq.network.backbone import backbone_of
from tfmq.network.sampling import sample
from tfmq.plan import announce_step

TEMPORAL = {"tasks": ["toy"], "precisions": ["w4a8"], "images": 4}
CPU = torch.device("cpu")


@pytest.fixture
def looked_at(suite):
    """The tiny suite, with a method whose temporal features are exact, and what is looked at."""
    document = yaml.safe_load(Path("params.yaml").read_text())
    document["tables"]["variants"]["methods"].append("full_precision_temporal")
    document["methods"]["full_precision_temporal"] = {"iterations": 2, "images": 2, "batch": 2}
    Path("params.yaml").write_text(yaml.safe_dump(document | {"temporal": TEMPORAL}, sort_keys=False))
    return suite


def angles(*degrees: float) -> torch.Tensor:
    return torch.tensor([[math.cos(math.radians(each)), math.sin(math.radians(each))] for each in degrees])


def test_a_feature_is_taken_for_the_step_whose_direction_is_nearest():
    known, candidates = torch.tensor([0, 1, 2, 3]), angles(0, 10, 20, 30) * torch.tensor([[1.0], [5.0], [0.1], [2.0]])
    steps = torch.tensor([1, 3])
    found = nearest_steps(3 * angles(14, 14), steps, candidates, known)
    assert found.tolist() == [1, 1]
    assert nearest_steps(angles(16, 31), steps, candidates, known).tolist() == [2, 3]
    # Two steps of one direction: what is no nearer than its own is no mistake.
    assert nearest_steps(angles(0, 0), torch.tensor([1, 2]), angles(0, 0, 0), known[:3]).tolist() == [1, 2]


def test_errors_are_relative_to_the_exact_features():
    assert relative_error(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 0.0]])).tolist() == [4 / 3]


def test_every_row_is_looked_at_and_sorted_by_its_deviation(looked_at, run, generate):
    assert generate("nearest", "w4a8") == (0, [])
    assert generate("full_precision_temporal", table="variants") == (0, [])
    assert run("temporal", "--task", "toy") == (0, [])
    found = json.loads(Path("results/temporal/toy.json").read_text())
    rows = {row["method"]: row for row in found["rows"]}
    assert list(rows) == ["nearest", "tfmq", "temporal_feature_matters", "full_precision_temporal"]
    assert found["steps"] == [1, 334, 667] and found["training_steps"] == 1000 and found["note"] == ""
    exact = rows["full_precision_temporal"]
    assert exact["exact"] and exact["mistaken"] == 0 == exact["largest_shift"] and not any(exact["deviation"]["median"])
    nearest = rows["nearest"]
    assert not nearest["exact"] and 0 < nearest["temporal_error"] < nearest["relative_error"] < 0.5
    assert len(nearest["deviation"]["median"]) == 3
    assert rows["tfmq"]["status"] == "failed" and "run `dvc repro`" in rows["tfmq"]["reason"]

    shifts = [(int(s), n) for row in nearest["shifts"].values() for s, n in row.items()]
    total = 3 * len(found["projections"])
    assert sum(n for _, n in shifts) == total
    assert nearest["mistaken"] == pytest.approx(sum(n for s, n in shifts if s) / total)
    assert nearest["mean_shift"] == pytest.approx(sum(abs(s) * n for s, n in shifts) / total)
    assert nearest["largest_shift"] == max(abs(s) for s, n in shifts)

    assert run("tables") == (0, [])
    page = Path("results/TEMPORAL.md").read_text()
    lines = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| ")]
    assert lines[1:] == ["Base, temporal layers exact", "Round-to-nearest"]
    assert "1 of 2 methods have full precision's own features" in page
    assert Path("results/figures/toy-temporal-deviation-w4a8.png").read_bytes().startswith(b"\x89PNG")


def test_deviation_is_that_of_a_network_whose_projections_alone_are_the_quantised_ones(looked_at, run, generate):
    """Computed again without tables: a hook puts what the quantised layers compute in the place of each output."""
    assert generate("nearest", "w4a8") == (0, [])
    assert run("temporal", "--task", "toy") == (0, [])
    row = json.loads(Path("results/temporal/toy.json").read_text())["rows"][0]
    task = params.load(Path("params.yaml")).tasks["toy"]
    quantized = load_quantized(files.cell_folder(Cell("toy", "nearest", "w4a8")) / files.QUANTIZED)

    def latents(hooked: bool) -> torch.Tensor:
        model = load_model(task, CPU)
        backbone = backbone_of(model.unet)

        def tell(module, args, kwargs):
            step = torch.as_tensor([args[1]])
            announce_step(quantized, step)
            features.update(zip(backbone.time_projections, backbone.temporal_features(quantized, step), strict=True))

        features: dict[str, torch.Tensor] = {}
        if hooked:
            model.unet.register_forward_pre_hook(tell, with_kwargs=True)
            for path in backbone.time_projections:
                layer = model.unet.get_submodule(path)
                layer.register_forward_hook(lambda _, args, output, path=path: features[path].expand_as(output))
        noise, step_noise = draw_noise(task, "sample", 0, range(4), model.latent_shape)
        return sample(model.unet, model.scheduler, noise, sampling_settings(task), step_noise=step_noise)

    with torch.no_grad():
        exact, other = latents(hooked=False), latents(hooked=True)
    deviations = (other - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    assert row["final_mean"]["value"] == pytest.approx(deviations.mean().item(), rel=1e-3)
    assert row["deviation"]["median"][-1] == pytest.approx(deviations.quantile(0.5).item(), rel=1e-3)


@pytest.mark.parametrize(("family", "scheduler"), [("ldm", "ddim"), ("dit", "ddim"), ("stable_diffusion", "pndm")])
def test_full_precision_from_tables_is_full_precision(family, scheduler, tmp_path, suite):
    discover.family(family).save_tiny(tmp_path / "model", 0)
    task = params.load(Path("params.yaml")).tasks["toy"]
    task = dataclasses.replace(task, family=family, checkpoint=str(tmp_path / "model"), scheduler=scheduler, eta=0.0)
    if family != "ldm":
        Path("evaluation.txt").write_text("circle\nsquare\n")
        task = dataclasses.replace(task, prompts=".", guidance_scale=2.0)
    model, tabled = load_model(task, CPU), load_model(task, CPU)
    backbone, steps = backbone_of(model.unet), sampled_steps(model, task)
    with torch.no_grad():
        features = backbone.temporal_features(model.unet, steps)
    sampling = TabledSampling(tabled, task, backbone, steps, 2)
    found = sampling.latents(features)
    noise, _ = draw_noise(task, "sample", 0, range(2), model.latent_shape)
    conditioning = conditioning_of(model, task, "sample", range(2))
    expected = sample(model.unet, model.scheduler, noise, sampling_settings(task), conditioning=conditioning)
    assert len(found) == task.steps + (scheduler == "pndm")
    torch.testing.assert_close(found[-1], expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(sampling.latents([2 * each for each in features])[-1], found[-1])
    note = temporal.describe(task, 2)["note"]
    assert ("The class is added" in note) == (family == "dit")


def test_a_network_without_features_of_the_time_step_alone_is_not_applicable(looked_at, run, monkeypatch):
    unet = pipelines.unet(time_cond_proj_dim=8)
    monkeypatch.setattr(temporal, "load_model", lambda *args: dataclasses.replace(load_model(*args), unet=unet))
    assert run("temporal", "--task", "toy") == (0, [])
    found = json.loads(Path("results/temporal/toy.json").read_text())
    assert found["rows"] == [] and found["note"].startswith("Not applicable: nothing in this network")
    assert run("tables") == (0, [])
    assert "## toy\n\nNot applicable:" in Path("results/TEMPORAL.md").read_text()


def test_a_cell_that_its_method_does_not_apply_to_says_why(looked_at, run):
    folder = files.cell_folder(Cell("toy", "nearest", "w4a8"))
    folder.mkdir(parents=True)
    (folder / files.OUTCOME).write_text(json.dumps({"status": "not applicable", "reason": "made for 8 bits"}))
    assert run("temporal", "--task", "toy") == (0, [])
    row = json.loads(Path("results/temporal/toy.json").read_text())["rows"][0]
    assert row == {"method": "nearest", "precision": "w4a8", "status": "not applicable", "reason": "made for 8 bits"}


def test_mistakes_are_one_line_each(looked_at, run):
    code, (line,) = run("temporal", "--task", "toi")
    assert code == 1 and "did you mean 'toy'" in line
    document = yaml.safe_load(Path("params.yaml").read_text())
    del document["temporal"]
    Path("params.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    code, (line,) = run("temporal", "--task", "toy")
    assert code == 1 and "toy is none of the tasks under `temporal` of params.yaml, which are none" in line
    for wrong, text in (
        ({"images": 1}, "temporal.images is 1, but must be at least 2"),
        ({"tasks": ["toi"]}, "unknown task in temporal 'toi': did you mean 'toy'"),
        ({"precisions": ["w4"]}, "w4"),
    ):
        with pytest.raises(ValueError, match=text):
            params.parse(document | {"temporal": TEMPORAL | wrong})
