"""How good the published models are: the measurements behind the data card, and the pictures that it shows."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, DiTPipeline, LDMPipeline, StableDiffusionPipeline, UNet2DConditionModel, VQModel
from torch import Tensor

from benchmarks.features import Evaluator, extract, load_evaluator
from benchmarks.features._clip import embed_images, embed_prompts, load_clip
from benchmarks.metrics._frechet import frechet_distance, moments
from benchmarks.models.class_ldm import ClassEmbedding
from benchmarks.small import clip, data, first_stage, kl_first_stage
from benchmarks.small.card import GRID_COLUMNS, draw, draw_named, draw_pairs
from benchmarks.small.class_conditional import class_indices
from benchmarks.small.guidance import Judge
from benchmarks.small.training import generator
from tfmq.network import sampling
from tfmq.network.sampling import Conditioning, SamplingSettings

SAMPLES = 64
SAMPLING_STEPS = 20
CLASS_SAMPLES = 64
NAMED_SAMPLES = 48
CLASS_GUIDANCE = 3.0
TEXT_GUIDANCE = 2.0
RETRIEVED_AMONG = 64


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


def measure_first_stage(pipeline: LDMPipeline, reference: Reference, pictures: Path) -> dict[str, float]:
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
    centroids = class_centroids(reference, labels, classes)
    tested = reference.held_out & (labels >= 0)
    found = extract(reference.evaluator, samples).pooled
    return {
        "class_accuracy_of_samples": mean_accuracy(nearest(found, centroids), drawn),
        "class_accuracy_of_held_out": mean_accuracy(nearest(reference.features[tested], centroids), labels[tested]),
        "class_unet_parameters": parameter_count(unet) + parameter_count(embedding),
    }


def measure_transformer(pipeline: DiTPipeline, reference: Reference, pictures: Path) -> dict[str, float]:
    """Draw samples of each class of the diffusion transformer, and see as in `measure_class_conditional` what they are.

    The stock pipeline samples them: DDIM, eta 0, with guidance.
    """
    classes = list(pipeline.labels)
    drawn = torch.arange(len(classes)).repeat_interleave(CLASS_SAMPLES)
    steps = {"num_inference_steps": SAMPLING_STEPS, "guidance_scale": CLASS_GUIDANCE, "output_type": "np"}
    source = generator(0, 0)
    images = [pipeline(part.tolist(), generator=source, **steps).images for part in drawn.split(CLASS_SAMPLES)]
    samples = (torch.from_numpy(np.concatenate(images)) * 255).round().to(torch.uint8).permute(0, 3, 1, 2)
    draw(samples.unflatten(0, (len(classes), -1))[:, :GRID_COLUMNS].flatten(0, 1), pictures / "dit-samples.png")
    labels = class_indices(reference.rows, classes)
    found = extract(reference.evaluator, samples).pooled
    centroids = class_centroids(reference, labels, len(classes))
    return {
        "dit_accuracy_of_samples": mean_accuracy(nearest(found, centroids), drawn),
        "dit_parameters": parameter_count(pipeline.transformer),
    }


def measure_kl(pipeline: LDMPipeline, images: Tensor, held_out: Tensor, pictures: Path) -> dict[str, float]:
    """Reconstruct images [N, 3, 64, 64] with the first stage of emoji-ldm8, and draw held-out ones below `pictures`."""
    vae = pipeline.vqvae
    reconstructed = kl_first_stage.reconstruct(vae, images)
    latents = kl_first_stage.encode(vae, images[~held_out]) * vae.config.scaling_factor
    draw_pairs(images[held_out], reconstructed[held_out], pictures / "kl-reconstructions.png", scale=1)
    quality = first_stage.psnr(reconstructed, images)
    return {
        "kl_held_out_psnr": quality[held_out].mean().item(),
        "kl_held_out_psnr_of_mean_error": pooled_psnr(reconstructed[held_out], images[held_out]),
        "kl_train_psnr": quality[~held_out].mean().item(),
        "kl_latent_largest": latents.abs().max().item(),
        "kl_first_stage_parameters": parameter_count(vae),
        "kl_unet_parameters": parameter_count(pipeline.unet),
    }


def measure_text_to_image(
    pipeline: StableDiffusionPipeline,
    clip_folder: Path,
    images: Tensor,
    rows: Sequence[data.Emoji],
    prompts: Sequence[str],
    pictures: Path,
) -> dict[str, float]:
    """Score samples of prompts, and the images [N, 3, 64, 64] of a table's rows, with a CLIP that the model never saw.

    Scores are means of 100 x cosine with the own prompt or name (`matching`), and with all other ones (`others`).
    """
    scorer = load_clip(clip_folder, torch.device("cpu"))
    samples = sample_text(pipeline, prompts, seed=0)
    draw_named(samples[:NAMED_SAMPLES], prompts[:NAMED_SAMPLES], pictures / "text-samples.png")
    held_out = torch.tensor([row.split == "held-out" for row in rows])
    found = {"samples": (samples, list(prompts))}
    for name, chosen in (("train", ~held_out), ("held_out", held_out)):
        found[name] = images[chosen], [rows[index].name for index in chosen.nonzero().flatten().tolist()]
    figures = {
        "text_encoder_parameters": parameter_count(pipeline.text_encoder),
        "text_unet_parameters": parameter_count(pipeline.unet),
    }
    for name, (pictured, names) in found.items():
        scores = clip.scores(scorer.model, scorer.tokenizer, pictured, names)
        figures |= {f"clip_{key}_{name}": scores[key] for key in ("matching", "others")}
    return figures


def classes_of(model: Path) -> list[str]:
    """The classes of the class-conditional model in a folder, in their order."""
    return ClassEmbedding.from_pretrained(model / "class_embedding", low_cpu_mem_usage=False).config.classes


def class_judge(classes: list[str], reference: Reference) -> Judge:
    """The share of images that are put into the class that they were made of, see `measure_class_conditional`."""
    centroids = class_centroids(reference, class_indices(reference.rows, classes), len(classes))

    def judge(images: Tensor, prompts: list[str]) -> dict[str, float]:
        found = nearest(extract(reference.evaluator, images).pooled, centroids)
        return {"class_accuracy": mean_accuracy(found, torch.tensor([classes.index(prompt) for prompt in prompts]))}

    return judge


def text_judge(clip_folder: Path) -> Judge:
    """CLIP score, and how often an image finds its own prompt first, or among the first five, of `RETRIEVED_AMONG`."""
    scorer = load_clip(clip_folder, torch.device("cpu"))

    def judge(images: Tensor, prompts: list[str]) -> dict[str, float]:
        cosines, ranks = [], []
        for start in range(0, len(prompts), RETRIEVED_AMONG):
            part = slice(start, start + RETRIEVED_AMONG)
            found = embed_images(scorer.model, images[part])
            table = found @ embed_prompts(scorer.model, scorer.tokenizer, prompts[part]).T
            cosines.append(table.diagonal())
            ranks.append((table > table.diagonal()[:, None]).sum(dim=1))
        rank = torch.cat(ranks)
        return {
            "clip_score": 100 * torch.cat(cosines).mean().item(),
            "top_1": (rank == 0).float().mean().item(),
            "top_5": (rank < 5).float().mean().item(),
        }

    return judge


@torch.no_grad()
def sample_text(pipeline: StableDiffusionPipeline, prompts: Sequence[str], seed: int) -> Tensor:
    """Uint8 images [N, 3, 64, 64] of the stock pipeline, one of each prompt: PNDM with guidance."""
    source, images = generator(seed, 0), []
    for start in range(0, len(prompts), SAMPLES):
        part = list(prompts[start : start + SAMPLES])
        size = pipeline.unet.config.sample_size
        noise = torch.randn(len(part), pipeline.unet.config.in_channels, size, size, generator=source)
        steps = {"num_inference_steps": SAMPLING_STEPS, "guidance_scale": TEXT_GUIDANCE}
        images.append(pipeline(part, **steps, latents=noise, output_type="np").images)
    return (torch.from_numpy(np.concatenate(images)) * 255).round().to(torch.uint8).permute(0, 3, 1, 2)


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
    settings = SamplingSettings(SAMPLING_STEPS, guidance_scale=CLASS_GUIDANCE)
    images = []
    for part, indices in zip(noise.split(CLASS_SAMPLES), classes.split(CLASS_SAMPLES), strict=True):
        none = torch.full_like(indices, len(embedding.config.classes))
        conditioning = Conditioning(embedding(indices), embedding(none))
        latents = sampling.sample(unet, scheduler, part, settings, conditioning=conditioning)
        images.append(first_stage.to_uint8(vqvae.decode(latents / vqvae.config.scaling_factor).sample))
    return torch.cat(images)


def class_centroids(reference: Reference, labels: Tensor, classes: int) -> Tensor:
    """Mean features (C, D) of the training images of each class; ``labels`` (N,) are the images' classes."""
    known = ~reference.held_out
    return torch.stack([reference.features[known & (labels == index)].mean(dim=0) for index in range(classes)])


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
