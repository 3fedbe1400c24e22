"""The figures of the data card: measured on the published models, written between the markers of README.md."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDIMScheduler, LDMPipeline, UNet2DConditionModel, VQModel
from PIL import Image
from torch import Tensor

from benchmarks.features import Evaluator, extract, load_evaluator
from benchmarks.metrics._frechet import frechet_distance, moments
from benchmarks.small import data, first_stage
from benchmarks.small.class_conditional import ClassEmbedding, class_indices
from benchmarks.small.training import generator
from tfmq import sampling
from tfmq.sampling import Conditioning, SamplingSettings

BEGIN = "<!-- figures -->"
END = "<!-- end of figures -->"
GRID_COLUMNS = 16
RECONSTRUCTED = 64
SAMPLES = 64
SAMPLING_STEPS = 20
CLASS_SAMPLES = 64
TRAININGS = ("first-stage", "diffusion", "class-diffusion")
GUIDANCE_SCALE = 3.0


@dataclass(frozen=True)
class Reference:
    """All images at 32x32 pixels: their rows of the table, which of them are held out, and their features."""

    rows: list[data.Emoji]
    images: Tensor
    held_out: Tensor
    evaluator: Evaluator
    features: Tensor


def load_reference(folder: Path) -> Reference:
    """Read `folder`/emoji, and extract features with the evaluator beside it."""
    rows = data.load_table(folder / "emoji")
    images = data.load_images(folder / "emoji", 32)
    held_out = torch.tensor([row.split == "held-out" for row in rows])
    evaluator = load_evaluator("efficientnet_lite0", folder / "efficientnet-lite0" / "model.safetensors")
    return Reference(rows, images, held_out, evaluator, extract(evaluator, images).pooled)


def measure(pipeline: LDMPipeline, reference: Reference, pictures: Path) -> dict[str, float]:
    """Reconstruct all images with the first stage of emoji-ldm4, and draw held-out ones below `pictures`."""
    images, held_out = reference.images, reference.held_out
    reconstructed = first_stage.reconstruct(pipeline.vqvae, images)
    unquantized = first_stage.reconstruct(pipeline.vqvae, images[held_out], quantize=False)
    latents = first_stage.encode(pipeline.vqvae, images[~held_out]) * pipeline.vqvae.config.scaling_factor
    draw_pairs(images[held_out], reconstructed[held_out], pictures / "reconstructions.png")
    found = extract(reference.evaluator, reconstructed).pooled
    by_google = torch.tensor([row.vendor == "google" for row in reference.rows])
    quality = first_stage.psnr(reconstructed, images)
    return {
        "held_out_psnr": quality[held_out].mean().item(),
        "held_out_psnr_of_mean_error": pooled_psnr(reconstructed[held_out], images[held_out]),
        "held_out_psnr_unquantized": first_stage.psnr(unquantized, images[held_out]).mean().item(),
        "train_psnr": quality[~held_out].mean().item(),
        "reconstruction_fd": frechet_distance(found, moments(reference.features)),
        "vendor_fd": frechet_distance(reference.features[by_google], moments(reference.features[~by_google])),
        "latent_mean": latents.mean().item(),
        "latent_deviation": latents.std().item(),
        "latent_largest": latents.abs().max().item(),
        "first_stage_parameters": parameter_count(pipeline.vqvae),
        "unet_parameters": parameter_count(pipeline.unet),
    }


def measure_class_conditional(model: Path, reference: Reference, pictures: Path) -> dict[str, float]:
    """Draw samples of each class of the model in a folder below `pictures`, and see whether they look their class.

    The classifier knows the mean features of each class's training images and takes the nearest. Accuracies are means
    over the classes; that of held-out images says what the classifier can do.
    """
    embedding = ClassEmbedding.from_pretrained(model / "class_embedding", low_cpu_mem_usage=False)
    unet = UNet2DConditionModel.from_pretrained(model / "unet", low_cpu_mem_usage=False)
    vqvae = VQModel.from_pretrained(model / "vqvae", low_cpu_mem_usage=False)
    scheduler = DDIMScheduler.from_pretrained(model / "scheduler")
    classes = len(embedding.config.classes)
    drawn = torch.arange(classes).repeat_interleave(CLASS_SAMPLES)
    samples = sample_classes(unet, vqvae, scheduler, embedding, drawn, seed=0)
    draw(samples.unflatten(0, (classes, -1))[:, :GRID_COLUMNS].flatten(0, 1), pictures / "class-samples.png")
    labels = class_indices(reference.rows, embedding.config.classes)
    known = ~reference.held_out
    centroids = torch.stack([reference.features[known & (labels == index)].mean(dim=0) for index in range(classes)])
    tested = reference.held_out & (labels >= 0)
    found = extract(reference.evaluator, samples).pooled
    return {
        "class_accuracy_of_samples": mean_accuracy(nearest(found, centroids), drawn),
        "class_accuracy_of_held_out": mean_accuracy(nearest(reference.features[tested], centroids), labels[tested]),
        "class_unet_parameters": parameter_count(unet) + parameter_count(embedding),
    }


@torch.no_grad()
def sample_classes(
    unet: UNet2DConditionModel,
    vqvae: VQModel,
    scheduler: DDIMScheduler,
    embedding: ClassEmbedding,
    classes: Tensor,
    seed: int,
) -> Tensor:
    """Uint8 images [N, 3, 32, 32], one of each of `classes`, by DDIM with eta 0 and guidance."""
    size = unet.config.sample_size
    noise = torch.randn(len(classes), unet.config.in_channels, size, size, generator=generator(seed, 0))
    settings = SamplingSettings(SAMPLING_STEPS, guidance_scale=GUIDANCE_SCALE)
    images = []
    for part, indices in zip(noise.split(CLASS_SAMPLES), classes.split(CLASS_SAMPLES), strict=True):
        none = torch.full_like(indices, len(embedding.config.classes))
        conditioning = Conditioning(embedding(indices), embedding(none))
        latents = sampling.sample(unet, scheduler, part, settings, conditioning=conditioning)
        images.append(first_stage.to_uint8(vqvae.decode(latents / vqvae.config.scaling_factor).sample))
    return torch.cat(images)


def nearest(features: Tensor, centroids: Tensor) -> Tensor:
    """The index of the centroid [C, D] nearest to each row of features [N, D]."""
    return torch.cdist(features, centroids).argmin(dim=1)


def mean_accuracy(found: Tensor, labels: Tensor) -> float:
    """The share of right ones among those of each class, averaged over the classes that `labels` has."""
    return torch.stack([(found[labels == label] == label).float().mean() for label in labels.unique()]).mean().item()


def sample(pipeline: LDMPipeline, count: int, seed: int) -> Tensor:
    """Uint8 images [N, 3, H, W] of the stock pipeline: DDIM, eta 0."""
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


def draw_pairs(images: Tensor, reconstructed: Tensor, path: Path, scale: int = 2) -> None:
    """Draw images in odd rows above their reconstructions in even rows: some of all, evenly spaced."""
    shown = torch.linspace(0, len(images) - 1, RECONSTRUCTED).long()
    pairs = torch.stack([images[shown], reconstructed[shown]]).unflatten(1, (-1, GRID_COLUMNS))
    draw(pairs.transpose(0, 1).flatten(0, 2), path, scale)


def table(figures: dict[str, float], logs: Path, folder: Path) -> str:
    """The figures, the training cost and the files below `folder`, as Markdown."""
    quality = [
        ("emoji-ldm4: parameters of the first stage", f"{figures['first_stage_parameters']:,}"),
        ("Parameters of the UNet", f"{figures['unet_parameters']:,}"),
        ("PSNR of held-out images, mean", f"{figures['held_out_psnr']:.2f} dB"),
        ("PSNR of held-out images, of the mean squared error", f"{figures['held_out_psnr_of_mean_error']:.2f} dB"),
        ("PSNR of held-out images without the codebook, mean", f"{figures['held_out_psnr_unquantized']:.2f} dB"),
        ("PSNR of training images, mean", f"{figures['train_psnr']:.2f} dB"),
        ("FD7572 of all images' reconstructions to the images", f"{figures['reconstruction_fd']:.1f}"),
        ("FD of Google's images to Twitter's, as a yardstick", f"{figures['vendor_fd']:.1f}"),
        ("Largest scaled latent of the training images", f"{figures['latent_largest']:.2f}"),
        ("Mean and deviation of scaled latents", f"{figures['latent_mean']:.3f}, {figures['latent_deviation']:.3f}"),
        ("emoji-class: parameters of UNet and embedding", f"{figures['class_unet_parameters']:,}"),
        ("Samples put into their own class, of nine", f"{figures['class_accuracy_of_samples']:.1%}"),
        ("Held-out images put into their own class", f"{figures['class_accuracy_of_held_out']:.1%}"),
    ]
    lines = ["| Figure | Value |", "|---|---:|", *(f"| {name} | {value} |" for name, value in quality), ""]
    lines += ["| Training | Iterations | Minutes |", "|---|---:|---:|"]
    for name in TRAININGS:
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
