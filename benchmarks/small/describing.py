"""The steps that describe what was made: the figures and pictures of the data card."""

import json
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, DiTPipeline, LDMPipeline, StableDiffusionPipeline

from benchmarks.runtime.text import read_lines
from benchmarks.small import card, data, export, guidance, measure
from benchmarks.small.folders import FIGURES, HERE, LOGS, PROMPTS, PUBLISHED, made
from benchmarks.small.settings import Settings
from benchmarks.suite import params

GUIDED = ("emoji-text", "emoji-class", "emoji-dit")


def run_measure(settings: Settings) -> None:
    """Measure the published models, and draw reconstructions and samples: the figures of the data card."""
    reference = measure.load_reference(PUBLISHED)
    images = data.load_images(PUBLISHED / "emoji", data.TILE)
    unconditional = {name: load_pipeline(LDMPipeline, name) for name in ("emoji-ldm4", "emoji-ldm8")}
    figures = measure.measure_first_stage(unconditional["emoji-ldm4"], reference, FIGURES)
    figures |= measure.measure_class_conditional(PUBLISHED / "emoji-class", reference, FIGURES)
    transformer = load_pipeline(DiTPipeline, "emoji-dit")
    figures |= measure.measure_transformer(transformer, reference, FIGURES)
    figures |= measure.measure_kl(unconditional["emoji-ldm8"], images, reference.held_out, FIGURES)
    text, clip_folder = load_pipeline(StableDiffusionPipeline, "emoji-text"), PUBLISHED / "emoji-clip"
    names = read_lines(PROMPTS / "emoji-text" / "evaluation.txt")
    figures |= measure.measure_text_to_image(text, clip_folder, images, reference.rows, names, FIGURES)
    export.write_json(figures, LOGS / "figures.json")
    suite = params.load(HERE.parent.parent / "params.yaml")
    judges = (
        measure.text_judge(clip_folder),
        measure.class_judge(measure.classes_of(PUBLISHED / "emoji-class"), reference),
        measure.class_judge(list(transformer.labels), reference),
    )
    for name, judge in zip(GUIDED, judges, strict=True):
        guidance.measure(suite.tasks[name], judge, guidance_log(name))
        guidance.draw(suite.tasks[name], FIGURES / f"guidance-{name}.png")
    for name, pipeline in unconditional.items():
        samples = measure.sample(pipeline, measure.SAMPLES, seed=0)
        card.draw(samples, FIGURES / f"{name}-samples.png", scale=64 // samples.shape[-1])


def guidance_log(task: str) -> Path:
    """The file of what was measured of a task over guidance scales."""
    return LOGS / f"guidance-{task}.jsonl"


def load_pipeline(kind: type[DiffusionPipeline], name: str) -> DiffusionPipeline:
    """A published model as the stock pipeline runs it."""
    pipeline = kind.from_pretrained(made(PUBLISHED / name), low_cpu_mem_usage=False, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run_card(settings: Settings) -> None:
    """Write the figures between the markers of the data card."""
    figures = json.loads((LOGS / "figures.json").read_text(encoding="utf-8"))
    text = card.table(figures, LOGS, PUBLISHED)
    for name in GUIDED:
        rows = guidance.read(guidance_log(name))
        if rows:  # what `measure` has come to
            text += f"\n\n### Guidance of {name}\n\n{guidance.table(rows)}"
    card.write(HERE / "README.md", text)
