"""Which guidance a conditional model bears: quality and sensitivity to quantisation over guidance scales and steps.

Guidance extrapolates from the unconditional prediction to the conditional one. Too much of it drives latents out of the
range that the model was trained in, and small differences grow there; a benchmark would then measure chaos. So each
guidance scale is sampled with the full-precision model and with its w8a8 round-to-nearest quantisation, from the same
noise.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import baselines
from benchmarks.models import Model
from benchmarks.report.figures import png, sample_grid
from benchmarks.runtime import files, manifest
from benchmarks.runtime.text import read_json_lines
from benchmarks.stages._setup import batches, conditioning_of, draw_noise, load_model, prompts_of, sampling_settings
from benchmarks.suite.discover import method
from benchmarks.suite.tasks import Task
from tfmq.network.backbone import Network
from tfmq.network.calibration import collect_calibration
from tfmq.network.sampling import sample
from tfmq.precision import Precision
from tfmq.quantization import quantize_

GUIDANCE_SCALES = (1.0, 1.5, 2.0, 2.5, 3.0, 5.0, 7.5)
STEPS = (20, 50)
IMAGES = 256
PICTURED = 10
# Calibration images of the w8a8 network: each gives a row at 20 of the steps.
CALIBRATION_IMAGES = 32
PURPOSE = "guidance"
# Of uint8 images (N, 3, H, W) and their prompts: figures by name, such as the CLIP score.
Judge = Callable[[Tensor, list[str]], dict[str, float]]


@dataclass(frozen=True)
class Row:
    """A guidance scale with a number of steps.

    Attributes:
        checkpoint: SHA-256 of the model's manifest.
        steps: steps of the sampler.
        guidance: guidance scale; 1 is none.
        images: images that were sampled.
        latent_deviation: standard deviation of all final latents; that of the training data is 1.
        quantized_mean: mean over images of ||q - x|| / ||x||, with x the final latents of full precision and q those
            of w8a8 round-to-nearest.
        quantized_median: the median of the same.
        quality: what a judge of the images says, by name.
    """

    checkpoint: str
    steps: int
    guidance: float
    images: int
    latent_deviation: float
    quantized_mean: float
    quantized_median: float
    quality: dict[str, float]


def measure(task: Task, judge: Judge, path: Path) -> list[Row]:
    """All rows of a conditional task; those that ``path`` holds of the same checkpoint already are not made again."""
    checkpoint = manifest.verify(Path(task.checkpoint))
    known = {(row.steps, row.guidance): row for row in read(path) if row.checkpoint == checkpoint}
    wanted = [(steps, guidance) for steps in STEPS for guidance in GUIDANCE_SCALES]
    for steps, guidance in tqdm(wanted, desc=f"{task.name}: guidance", disable=None):
        if (steps, guidance) not in known:
            known[steps, guidance] = _row(_at(task, steps, guidance), checkpoint, judge)
            lines = [json.dumps(asdict(known[key])) for key in wanted if key in known]
            files.write_text(path, "\n".join(lines) + "\n")
    return [known[key] for key in wanted]


def read(path: Path) -> list[Row]:
    """The rows of a file that `measure` writes, none where it is missing."""
    return [Row(**row) for row in read_json_lines(path)] if path.is_file() else []


# How a column of `table` is called and printed.
QUALITY = {
    "class_accuracy": ("Class accuracy", "{:.0%}"),
    "clip_score": ("CLIP score", "{:.1f}"),
    "top_1": ("Top-1 retrieval among 64", "{:.0%}"),
    "top_5": ("Top-5 retrieval", "{:.0%}"),
}


def table(rows: list[Row]) -> str:
    """Markdown of one or more rows."""
    names = list(rows[0].quality)
    quality = [QUALITY[name][0] for name in names]
    heads = ["Steps", "Guidance", *quality, "Std of latents", "w8a8 deviation, mean", "Median"]
    lines = [f"| {' | '.join(heads)} |", f"|{'---:|' * len(heads)}"]
    for row in rows:
        quality = [QUALITY[name][1].format(row.quality[name]) for name in names]
        numbers = [f"{row.latent_deviation:.2f}", f"{row.quantized_mean:.3f}", f"{row.quantized_median:.3f}"]
        lines.append(f"| {' | '.join([str(row.steps), f'{row.guidance:g}', *quality, *numbers])} |")
    return "\n".join(lines)


def draw(task: Task, path: Path) -> None:
    """Write one row of samples for each guidance scale, with the first number of steps: the same noise in a column."""
    images = {}
    for guidance in GUIDANCE_SCALES:
        at = _at(task, STEPS[0], guidance)
        model = load_model(at, torch.device("cpu"))
        images[f"guidance {guidance:g}"] = model.decode(_latents(model, model.unet, at, range(PICTURED))).numpy()
    prompts = prompts_of(task, "sample", range(PICTURED))
    files.write_bytes(path, png(sample_grid(images, PICTURED, prompts)))


def _at(task: Task, steps: int, guidance: float) -> Task:
    """The task with another guidance scale and number of steps."""
    return replace(task, steps=steps, guidance_scale=guidance, images=IMAGES, calibration_images=CALIBRATION_IMAGES)


@torch.no_grad()
def _row(task: Task, checkpoint: str, judge: Judge) -> Row:
    model = load_model(task, torch.device("cpu"))
    latents = torch.cat([_latents(model, model.unet, task, part) for part in batches(IMAGES, task.batch)])
    images = torch.cat([model.decode(part) for part in latents.split(task.batch)])
    quantized = _quantized(model, task)
    found = torch.cat([_latents(model, quantized, task, part) for part in batches(IMAGES, task.batch)])
    difference = (found - latents).flatten(1).norm(dim=1) / latents.flatten(1).norm(dim=1)
    return Row(
        checkpoint,
        task.steps,
        task.guidance_scale,
        IMAGES,
        latents.std().item(),
        difference.mean().item(),
        difference.median().item(),
        judge(images, prompts_of(task, "sample", range(IMAGES))),
    )


def _latents(model: Model, unet: Network, task: Task, images: range) -> Tensor:
    """Final latents (N, C, H, W) of some images."""
    noise, step_noise = draw_noise(task, PURPOSE, 0, images, model.latent_shape)
    conditioning = conditioning_of(model, task, "sample", images)
    settings = sampling_settings(task)
    return sample(unet, model.scheduler, noise, settings, conditioning=conditioning, step_noise=step_noise)


def _quantized(model: Model, task: Task) -> Network:
    """The UNet at w8a8 by round-to-nearest, calibrated at the task's guidance scale and steps."""
    images = range(task.calibration_images)
    noise, _ = draw_noise(task, "calibration", 0, images, model.latent_shape)
    pool = collect_calibration(
        model.unet,
        model.scheduler,
        noise,
        sampling_settings(task),
        batch=task.batch,
        conditioning=conditioning_of(model, task, "calibration", images),
    )
    nearest: baselines.Method = method("nearest")
    unet = copy.deepcopy(model.unet)
    quantize_(unet, Precision.parse("w8a8"), nearest.config().recipe(), pool, torch.Generator().manual_seed(0))
    return unet
