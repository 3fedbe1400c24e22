"""The data card: pictures, and the table of figures between the markers of README.md."""

import hashlib
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from benchmarks.runtime.text import read_json_lines

BEGIN = "<!-- figures -->"
END = "<!-- end of figures -->"
GRID_COLUMNS = 16
NAMED_COLUMNS = 8
RECONSTRUCTED = 64
TRAININGS = (
    "first-stage",
    "diffusion",
    "class-diffusion",
    "transformer",
    "kl-first-stage",
    "kl-diffusion",
    "text-clip",
    "score-clip",
    "text-diffusion",
)


def draw(images: Tensor, path: Path, scale: int = 2, gap: int = 2) -> None:
    """Write uint8 images [N, 3, H, W] as one PNG, row by row on grey, each pixel `scale` pixels wide."""
    rows = -(-len(images) // GRID_COLUMNS)
    side = images.shape[-1] * scale + gap
    canvas = torch.full((rows * side + gap, GRID_COLUMNS * side + gap, 3), 128, dtype=torch.uint8)
    enlarged = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3).permute(0, 2, 3, 1)
    for index, image in enumerate(enlarged):
        top, left = index // GRID_COLUMNS * side + gap, index % GRID_COLUMNS * side + gap
        canvas[top : top + side - gap, left : left + side - gap] = image
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    Image.fromarray(canvas.numpy()).save(unfinished, format="PNG", optimize=True)
    unfinished.replace(path)


def draw_named(images: Tensor, names: Sequence[str], path: Path) -> None:
    """Write uint8 images [N, 3, H, W] as one PNG, each below its name."""
    rows = -(-len(images) // NAMED_COLUMNS)
    figure = Figure(figsize=(1.3 * NAMED_COLUMNS, 1.6 * rows), layout="constrained")
    for place, (image, name) in enumerate(zip(images, names, strict=True), start=1):
        axes = figure.add_subplot(rows, NAMED_COLUMNS, place)
        axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set_title(textwrap.fill(name.lower(), 18), fontsize=7, verticalalignment="bottom")
        axes.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    figure.savefig(unfinished, format="png", dpi=100, metadata={"Software": None})
    unfinished.replace(path)


def draw_pairs(images: Tensor, reconstructed: Tensor, path: Path, scale: int = 2) -> None:
    """Draw images in odd rows above their reconstructions in even rows: some of all, evenly spaced."""
    shown = torch.linspace(0, len(images) - 1, RECONSTRUCTED).long()
    pairs = torch.stack([images[shown], reconstructed[shown]]).unflatten(1, (-1, GRID_COLUMNS))
    draw(pairs.transpose(0, 1).flatten(0, 2), path, scale)


def table(figures: dict[str, float], logs: Path, folder: Path) -> str:
    """The figures, the training cost and the files below `folder`, as Markdown, of the models that are there."""
    count, decibel, share, score = "{:,}", "{:.2f} dB", "{:.1%}", "{:.1f}"
    shown = [
        ("emoji-ldm4", "Parameters of the first stage", "first_stage_parameters", count),
        ("", "Parameters of the UNet", "unet_parameters", count),
        ("", "PSNR of held-out images, mean", "held_out_psnr", decibel),
        ("", "PSNR of held-out images, of the mean squared error", "held_out_psnr_of_mean_error", decibel),
        ("", "PSNR of held-out images without the codebook, mean", "held_out_psnr_unquantized", decibel),
        ("", "PSNR of training images, mean", "train_psnr", decibel),
        ("", "FD7572 of all images' reconstructions to the images", "reconstruction_fd", score),
        ("", "FD of Google's images to Twitter's, as a yardstick", "vendor_fd", score),
        ("", "Largest scaled latent of the training images", "latent_largest", "{:.2f}"),
        ("", "Mean of scaled latents", "latent_mean", "{:.3f}"),
        ("", "Deviation of scaled latents", "latent_deviation", "{:.3f}"),
        ("emoji-class", "Parameters of UNet and embedding", "class_unet_parameters", count),
        ("", "Samples put into their own class, of nine", "class_accuracy_of_samples", share),
        ("", "Held-out images put into their own class", "class_accuracy_of_held_out", share),
        ("emoji-dit", "Parameters of the transformer", "dit_parameters", count),
        ("", "Samples put into their own class, of nine", "dit_accuracy_of_samples", share),
        ("emoji-ldm8", "Parameters of the first stage", "kl_first_stage_parameters", count),
        ("", "Parameters of the UNet", "kl_unet_parameters", count),
        ("", "PSNR of held-out images, mean", "kl_held_out_psnr", decibel),
        ("", "PSNR of held-out images, of the mean squared error", "kl_held_out_psnr_of_mean_error", decibel),
        ("", "PSNR of training images, mean", "kl_train_psnr", decibel),
        ("", "Largest scaled latent of the training images", "kl_latent_largest", "{:.2f}"),
        ("emoji-text", "Parameters of the UNet", "text_unet_parameters", count),
        ("", "Parameters of the text encoder", "text_encoder_parameters", count),
        ("", "CLIP score of samples with their prompts", "clip_matching_samples", score),
        ("", "CLIP score of samples with other prompts", "clip_others_samples", score),
        ("emoji-clip", "CLIP score of held-out images with their names", "clip_matching_held_out", score),
        ("", "CLIP score of held-out images with other names", "clip_others_held_out", score),
        ("", "CLIP score of training images with their names", "clip_matching_train", score),
        ("", "CLIP score of training images with other names", "clip_others_train", score),
    ]
    lines = ["| Model | Figure | Value |", "|---|---|---:|"]
    lines += [
        f"| {model} | {name} | {form.format(figures[key])} |" for model, name, key, form in shown if key in figures
    ]
    lines.append("")
    lines += ["| Training | Iterations | Minutes |", "|---|---:|---:|"]
    for name in TRAININGS:
        if not (logs / f"{name}.jsonl").is_file():
            continue
        last = read_json_lines(logs / f"{name}.jsonl")[-1]
        lines.append(f"| {name} | {last['iteration']:,} | {last['seconds'] / 60:.0f} |")
    lines += ["", "| File | Bytes | SHA-256 |", "|---|---:|---|"]
    for path in sorted(file for file in folder.rglob("*") if file.is_file()):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        lines.append(f"| {path.relative_to(folder)} | {path.stat().st_size:,} | `{digest}` |")
    return "\n".join(lines)


def write(path: Path, text: str) -> None:
    """Replace what stands between the markers of a Markdown file."""
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"{path} needs the lines {BEGIN!r} and {END!r}: the figures go between them.")
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
    unfinished.replace(path)
