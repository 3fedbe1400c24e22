"""The figures of the data card: measured on the published models, written between the markers of README.md."""

import hashlib
import json
from pathlib import Path

import torch
from diffusers import LDMPipeline
from PIL import Image
from torch import Tensor

from benchmarks.features import extract, load_evaluator
from benchmarks.metrics._frechet import frechet_distance, moments
from benchmarks.small import data, first_stage

BEGIN = "<!-- figures -->"
END = "<!-- end of figures -->"
GRID_COLUMNS = 16
RECONSTRUCTED = 64
SAMPLES = 64
SAMPLING_STEPS = 20


def measure(pipeline: LDMPipeline, folder: Path, pictures: Path) -> dict[str, float]:
    """Reconstruct all images of `folder`/emoji, and draw held-out ones below `pictures`."""
    rows = data.load_table(folder / "emoji")
    images = data.load_images(folder / "emoji", 32)
    held_out = torch.tensor([row.split == "held-out" for row in rows])
    reconstructed = first_stage.reconstruct(pipeline.vqvae, images)
    unquantized = first_stage.reconstruct(pipeline.vqvae, images[held_out], quantize=False)
    latents = first_stage.encode(pipeline.vqvae, images[~held_out]) * pipeline.vqvae.config.scaling_factor
    shown = torch.linspace(0, int(held_out.sum()) - 1, RECONSTRUCTED).long()
    pairs = torch.stack([images[held_out][shown], reconstructed[held_out][shown]]).unflatten(1, (-1, GRID_COLUMNS))
    draw(pairs.transpose(0, 1).flatten(0, 2), pictures / "reconstructions.png")
    evaluator = load_evaluator("efficientnet_lite0", folder / "efficientnet-lite0" / "model.safetensors")
    features = extract(evaluator, images).pooled
    by_google = torch.tensor([row.vendor == "google" for row in rows])
    quality = first_stage.psnr(reconstructed, images)
    return {
        "held_out_psnr": quality[held_out].mean().item(),
        "held_out_psnr_of_mean_error": pooled_psnr(reconstructed[held_out], images[held_out]),
        "held_out_psnr_unquantized": first_stage.psnr(unquantized, images[held_out]).mean().item(),
        "train_psnr": quality[~held_out].mean().item(),
        "reconstruction_fd": frechet_distance(extract(evaluator, reconstructed).pooled, moments(features)),
        "vendor_fd": frechet_distance(features[by_google], moments(features[~by_google])),
        "latent_mean": latents.mean().item(),
        "latent_deviation": latents.std().item(),
        "latent_largest": latents.abs().max().item(),
        "first_stage_parameters": parameter_count(pipeline.vqvae),
        "unet_parameters": parameter_count(pipeline.unet),
    }


def sample(pipeline: LDMPipeline, count: int, seed: int) -> Tensor:
    """Uint8 images [N, 3, 32, 32] of the stock pipeline: DDIM, eta 0."""
    generator = torch.Generator().manual_seed(seed)
    images = pipeline(count, generator, eta=0.0, num_inference_steps=SAMPLING_STEPS, output_type="np").images
    return (torch.from_numpy(images) * 255).round().to(torch.uint8).permute(0, 3, 1, 2)


def pooled_psnr(images: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of the squared error averaged over all images, which bad ones dominate."""
    error = (images.float() - reference.float()).square().mean()
    return (10 * torch.log10(255.0**2 / error)).item()


def parameter_count(network: torch.nn.Module) -> int:
    """The number of weights, biases and codes."""
    return sum(parameter.numel() for parameter in network.parameters())


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


def table(figures: dict[str, float], logs: Path, folder: Path) -> str:
    """The figures, the training cost and the files below `folder`, as Markdown."""
    quality = [
        ("Parameters of the first stage", f"{figures['first_stage_parameters']:,}"),
        ("Parameters of the UNet", f"{figures['unet_parameters']:,}"),
        ("PSNR of held-out images, mean", f"{figures['held_out_psnr']:.2f} dB"),
        ("PSNR of held-out images, of the mean squared error", f"{figures['held_out_psnr_of_mean_error']:.2f} dB"),
        ("PSNR of held-out images without the codebook, mean", f"{figures['held_out_psnr_unquantized']:.2f} dB"),
        ("PSNR of training images, mean", f"{figures['train_psnr']:.2f} dB"),
        ("FD7572 of all images' reconstructions to the images", f"{figures['reconstruction_fd']:.1f}"),
        ("FD of Google's images to Twitter's, as a yardstick", f"{figures['vendor_fd']:.1f}"),
        ("Largest scaled latent of the training images", f"{figures['latent_largest']:.2f}"),
        ("Mean and deviation of scaled latents", f"{figures['latent_mean']:.3f}, {figures['latent_deviation']:.3f}"),
    ]
    lines = ["| Figure | Value |", "|---|---:|", *(f"| {name} | {value} |" for name, value in quality), ""]
    lines += ["| Training | Iterations | Minutes |", "|---|---:|---:|"]
    for name in ("first-stage", "diffusion"):
        last = json.loads((logs / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[-1])
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
