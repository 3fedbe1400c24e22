"""Conditional tasks through all stages: prompts, guidance, a schedule that repeats a step, and calibration seeds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from benchmarks.runtime import files, manifest
from benchmarks.stages import _setup, generate
from benchmarks.suite import discover, params
from benchmarks.suite.record import Cell, Record

ROW = Path("work/cells/words/nearest")
PROMPTS = {"calibration": ["circle", "square", "square"], "evaluation": ["square", "circle"]}


def save_clip(folder: Path) -> None:
    tower = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = CLIPTokenizer(model_max_length=8).train_new_from_iterator([""], 514, show_progress=False)
    text = tower | {"vocab_size": len(tokenizer), "max_position_embeddings": 8, "eos_token_id": tokenizer.eos_token_id}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = CLIPConfig(text_config=text, vision_config=tower | {"image_size": 32, "patch_size": 16})
        CLIPModel(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "tokenizer")
    manifest.write(folder)


def change_task(**changes: object) -> None:
    document = yaml.safe_load(Path("params.yaml").read_text())
    document["tasks"]["words"] |= changes
    Path("params.yaml").write_text(yaml.safe_dump(document, sort_keys=False))


@pytest.fixture
def words(suite, request):
    """The tiny suite with another task, of the family and scheduler given; w4a8 has two calibration seeds."""
    family, scheduler = getattr(request, "param", ("class_ldm", "ddim"))
    discover.family(family).save_tiny(Path("data/words"), 0)
    for name, lines in PROMPTS.items():
        Path("prompts").mkdir(exist_ok=True)
        Path("prompts", f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))
    document = yaml.safe_load(Path("params.yaml").read_text())
    task = {"family": family, "scheduler": scheduler, "checkpoint": "data/words", "prompts": "prompts"}
    if family == "stable_diffusion":
        save_clip(Path("data/toy-clip"))
        task["clip"] = ["data/toy-clip"]
    task |= {"eta": 0.0, "guidance_scale": 3.0, "calibration_images": 2}
    document["tasks"]["words"] = document["tasks"]["toy"] | task
    table = {"protocol": "shared", "tasks": ["words"], "precisions": ["w8a8", "w4a8"], "seeds": {"w4a8": 2}}
    document["tables"] = {"leaderboard": table | {"methods": ["nearest"]}}
    Path("params.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    return params.load(Path("params.yaml")).tasks["words"]


@pytest.mark.parametrize(
    "words", [("class_ldm", "ddim"), ("stable_diffusion", "pndm"), ("stable_diffusion_xl", "euler")], indirect=True
)
def test_a_conditional_task_goes_through_all_stages(words, run):
    evaluations = words.steps + (words.scheduler == "pndm")
    for stage in ("calibrate", "reference"):
        assert run(stage, "--task", "words", "--shards", "1") == (0, [])
    pools = [load_file(files.calibration("words") / files.pool(seed)) for seed in (0, 1)]
    model = _setup.load_model(words, torch.device("cpu"))
    for pool, prompts in zip(pools, (["circle", "square"], ["square", "circle"]), strict=True):
        assert pool["latents"].shape[:2] == (evaluations, 2) and len(pool["timesteps"].unique()) == words.steps
        conditioning = model.conditioning(prompts)
        torch.testing.assert_close(pool["context"], conditioning.context)
        for group in ("inputs", "unconditional_inputs"):
            given = getattr(conditioning, group)
            recorded = {name.removeprefix(f"{group}/") for name in pool if name.startswith(f"{group}/")}
            assert recorded == given.keys()
            for name, value in given.items():
                torch.testing.assert_close(pool[f"{group}/{name}"], value)
    assert not torch.equal(pools[0]["latents"][0], pools[1]["latents"][0])
    cost = json.loads((files.calibration("words") / files.COST).read_text())
    assert cost["unet_evaluations"] == 2 * 2 * evaluations  # both halves of guidance
    for method in ("full_precision", "nearest"):
        for stage in ("generate", "score"):
            row = (stage, "--task", "words", "--method", method, "--table", "leaderboard", "--shards", "1")
            assert run(*row) == (0, [])
    assert sorted(path.name for path in ROW.iterdir()) == ["w4a8", "w4a8-s1", "w8a8"]
    cells = [Cell("words", "nearest", "w4a8", seed) for seed in (0, 1)]
    records = [Record.from_json(files.record_file(cell).read_text()) for cell in cells]
    for seed, record in enumerate(records):
        assert record.status == "measured" and record.seed == seed
        assert record.inputs["calibration"] == files.sha256(files.calibration("words") / files.pool(seed))
        assert record.inputs["prompts"] == files.sha256(Path("prompts/evaluation.txt"))
        assert ("clip_score" in record.metrics) == bool(words.clip)
        errors = load_file(files.cell_folder(record.cell) / files.ERRORS)
        assert errors["trajectory"].shape == (2, evaluations) and errors["timesteps"].shape == (evaluations,)
    assert records[0].inputs["trajectory"] == records[1].inputs["trajectory"]
    assert records[0].inputs["images"] != records[1].inputs["images"]
    assert [name.split()[0] for name in records[0].settings["clip"]] == [Path(folder).name for folder in words.clip]
    assert run("tables") == (0, [])


def test_one_seed_of_a_row_can_be_generated_alone(words, run):
    row = ("--task", "words", "--method", "nearest", "--table", "leaderboard", "--shards", "1")
    suite = params.load(Path("params.yaml"))
    assert _setup.cells_of(suite, "leaderboard", "words", "nearest", seed=1) == [Cell("words", "nearest", "w4a8", 1)]
    assert "no cell has seed 2" in run("generate", *row, "--seed", "2")[1][0]
    assert "full precision has 0 alone" in run("generate", *row, "--method", "full_precision", "--seed", "1")[1][0]


def test_prompts_follow_the_images_and_start_again(words):
    assert _setup.prompts_of(words, "sample", range(1, 4)) == ["circle", "square", "circle"]
    assert _setup.prompts_of(words, "reference", range(2)) == PROMPTS["evaluation"]
    assert _setup.prompts_of(words, "calibration", range(2)) == ["circle", "square"]
    assert _setup.prompts_of(words, "calibration", range(2), seed=1) == ["square", "circle"]


def test_without_guidance_there_is_no_unconditional_half(words):
    change_task(guidance_scale=1.0)
    task = params.load(Path("params.yaml")).tasks["words"]
    model = _setup.load_model(task, torch.device("cpu"))
    assert _setup.conditioning_of(model, task, "sample", range(2)).unconditional is None


@pytest.mark.parametrize("content", [None, "", "circle\n\nsquare\n"])
def test_missing_and_empty_prompts_are_named(words, run, content):
    path = Path("prompts/calibration.txt")
    path.unlink()
    if content is not None:
        path.write_text(content)
    message = "prompts/calibration.txt is missing, empty or has an empty line: write one prompt a line"
    assert run("calibrate", "--task", "words", "--shards", "1") == (1, [f"error: {message}"])
    assert not files.calibration("words").exists()


def test_unknown_classes_are_named(words, run):
    Path("prompts/evaluation.txt").write_text("squar\n")
    row = ("--task", "words", "--method", "full_precision", "--shards", "1")
    code, lines = run("generate", *row)
    assert code == 1 and "unknown class of data/words 'squar': did you mean 'square'?" in lines[0]


def test_prompts_belong_to_conditional_models_alone(words, run):
    change_task(prompts=None, guidance_scale=1.0)
    message = "task words has no prompts, but a model of family class_ldm needs them"
    assert run("calibrate", "--task", "words", "--shards", "1") == (1, [f"error: {message}"])
    change_task(prompts="prompts", family="ldm", checkpoint="data/toy")
    message = "task words has prompts, but a model of family ldm takes none"
    assert run("calibrate", "--task", "words", "--shards", "1") == (1, [f"error: {message}"])


def test_other_prompts_start_a_cell_anew(words):
    suite, cell = params.load(Path("params.yaml")), Cell("words", "full_precision", "w32a32")
    before = generate._prepare(suite, cell, torch.device("cpu")).folder
    Path("prompts/evaluation.txt").write_text("circle\n")
    assert generate._prepare(suite, cell, torch.device("cpu")).folder != before
